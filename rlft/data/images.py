"""Images of a row: where they are given, their bytes, and the tokens that stand for them in a prompt.

An image is given in the columns `images` or `image`, or in a part of a message ({"type": "image", "image": ...}), as a
path, the bytes of a file, a PIL image, a data URL, or what `datasets` makes of one ({"bytes", "path"}). Every image is
opened once when the rows are encoded, so that a broken file is named by its row before a run starts, and again when its
features are needed; in between only its path and a digest of its bytes are kept.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlft.errors import DataError
from rlft.types import Image

COLUMNS = ("images", "image")
"""Columns that hold the images of a row, several or one."""
PARTS = ("image", "image_url", "input_image")
"""Types of the parts of a message that are an image, ours and OpenAI's."""
HELD_BY = ("image", "image_url", "url", "path", "bytes", "base64")
"""Keys of such a part, any of which holds the image."""
DATA_URL = "data:"
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Modes of PIL images that PNG files hold."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are read: others start programs (EPS), or are rarely of pictures."""
THUMBNAIL = 128
"""Largest side of the small picture of an image, in pixels: a few kilobytes."""
MARK = "<image>"
"""Place of an image in the texts of LLaVA's datasets."""


# ---- where a row has its images ------------------------------------------------------------------------------------


def images_in(row: Mapping[str, Any]) -> list[Any]:
    """Return the images in the columns of a row, in order. Raises DataError for a row with both columns."""
    found = [name for name in COLUMNS if row.get(name) is not None]
    if len(found) > 1:
        raise DataError("the row has the columns images and image; leave out one of them", reason="images")
    if not found:
        return []
    value = row[found[0]]
    return list(value) if isinstance(value, list | tuple) else [value]


def shows_images(row: Mapping[str, Any]) -> bool:
    """Return whether a row has images, or messages with places for them."""
    conversations = (row.get(column) for column in ("prompt", "messages"))
    return bool(images_in(row)) or any(
        has_image(message) for messages in conversations if isinstance(messages, list) for message in messages
    )


def is_image(part: Any) -> bool:
    """Return whether a part of a message is an image."""
    return isinstance(part, Mapping) and part.get("type") in PARTS


def held_in(part: Mapping[str, Any]) -> Any:
    """Return the image that a part of a message holds; None for a part that is only its place."""
    held = {name: part[name] for name in HELD_BY if part.get(name) is not None}
    if "bytes" in held:
        return held["bytes"]
    if "base64" in held:
        return f"{DATA_URL};base64,{held['base64']}"
    value = next(iter(held.values()), None)
    return value["url"] if isinstance(value, Mapping) and "url" in value else value


def has_image(message: Mapping[str, Any]) -> bool:
    """Return whether a message has a part that is an image."""
    content = message.get("content")
    return isinstance(content, list) and any(map(is_image, content))


def with_places(messages: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return messages with `count` places for images before the text of the first message of the user.

    Messages that have places are returned as they are. Raises DataError where no message is the user's.
    """
    if not count or any(map(has_image, messages)):
        return list(messages)
    for message in messages:
        if MARK in text_of(message.get("content", "")):
            raise DataError(
                f"a message has the text {MARK}, which is not read as an image: give its content as parts, "
                f'[{{"type": "image"}}, {{"type": "text", "text": ...}}]',
                reason="images",
            )
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise DataError("the row has images, and none of its messages is the user's, which would show them")
    text = messages[first]["content"]
    parts = text if isinstance(text, list) else [{"type": "text", "text": text}]
    shown = {**messages[first], "content": [*({"type": "image"} for _ in range(count)), *parts]}
    return [*messages[:first], shown, *messages[first + 1 :]]


def text_of(content: Any) -> str:
    """Return the text of a message's content, without its images."""
    if not isinstance(content, list):
        return str(content)
    return "".join(part["text"] for part in content if not is_image(part))


# ---- bytes and digests ---------------------------------------------------------------------------------------------


def source_of(value: Any, folders: Sequence[Path] = ()) -> str | bytes:
    """Return the absolute path of an image, or its bytes.

    folders: those of the dataset's files, in which relative paths are looked up before the working directory. Raises
    DataError for a path without a file, one that two of the folders have, and for any other value.
    """
    if isinstance(value, Mapping):
        inner = value.get("bytes") if value.get("bytes") is not None else value.get("path") or value.get("url")
        if inner is not None:
            return source_of(inner, folders)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, Path):
        return source_of(str(value), folders)
    if isinstance(value, str) and value:
        return _of_text(value, folders)
    if hasattr(value, "save") and hasattr(value, "tobytes"):  # a PIL image
        return png_of(value)
    raise DataError(f"{_shown(value)} is no image: want a path, bytes, a PIL image or a data URL", reason="images")


def _of_text(value: str, folders: Sequence[Path]) -> str | bytes:
    if value.startswith(DATA_URL):
        kind, _, data = value.partition(",")
        try:
            return base64.b64decode(data, validate=True)
        except ValueError as error:
            raise DataError(f"{kind!r:.40} is a data URL whose base64 is broken ({error})", reason="images") from None
    if value.startswith(("http://", "https://")):
        raise DataError(f"{value!r:.80} is a URL: download images first, and give their paths", reason="images")
    path = Path(value.removeprefix("file://")).expanduser()
    if path.is_absolute():
        return str(path)
    here = list(dict.fromkeys(folder.absolute() / path for folder in folders if (folder / path).is_file()))
    if len(here) > 1:
        raise DataError(f"{value} is in {here[0].parent} and in {here[1].parent}: give absolute paths", reason="images")
    return str(here[0] if here else Path.cwd() / path)


def png_of(picture: Any) -> bytes:
    """Return a PIL image as the bytes of a PNG file."""
    from PIL import ImageOps

    buffer = io.BytesIO()
    # Turned as its camera was, which a PNG does not say.
    upright = ImageOps.exif_transpose(picture)
    (upright if upright.mode in PNG_MODES else upright.convert("RGB")).save(buffer, format="PNG")
    return buffer.getvalue()


def data_url(data: bytes, kind: str = "") -> str:
    """Return the bytes of an image as text. kind: its media type."""
    return f"{DATA_URL}{kind};base64,{base64.b64encode(data).decode()}"


def bytes_of(source: str | bytes) -> bytes:
    """Return the bytes of an image. Raises DataError for a file that cannot be read."""
    if isinstance(source, bytes):
        return source
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise DataError(f"{source} cannot be read ({error.strerror or error})", reason="images") from None


def digest_of(data: bytes) -> str:
    """Return 32 hex digits of the bytes of an image."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def thumbnail(image: Image) -> str | None:
    """Return a small picture of an image as a data URL; None for a file that cannot be read, or has other bytes."""
    buffer = io.BytesIO()
    try:
        data = bytes_of(image.source)
        if digest_of(data) != image.digest:
            return None
        picture = decoded(data, name_of(image.source), small=True)
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        # Without the comment of the file, which is of any length, and may name people.
        picture.save(buffer, format="JPEG", quality=75, comment=b"")
    except (DataError, OSError, ValueError, MemoryError):
        return None
    return data_url(buffer.getvalue(), "image/jpeg")


def decoded(data: bytes, name: str, small: bool = False) -> Any:
    """Return a PIL image in RGB, upright as its camera was held, as transformers and datasets read one.

    name: of the image, for errors. small: a JPEG may be decoded at a fraction of its size, at least twice that of a
    small picture. Raises DataError for bytes that are no whole image of `FORMATS`.
    """
    from PIL import Image as Pillow
    from PIL import ImageOps

    try:
        with Pillow.open(io.BytesIO(data), formats=FORMATS) as opened:
            if small:
                opened.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))
            return ImageOps.exif_transpose(opened).convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise errors of many kinds, SyntaxError among them
        what = str(error).partition("<_io")[0].strip() or type(error).__name__
        raise DataError(f"{name} is no image that can be read ({what})", reason="images") from None


def _shown(value: Any) -> str:
    return f"{type(value).__name__} of {len(value)} bytes" if isinstance(value, bytes) else f"{value!r:.60}"


def name_of(source: str | bytes) -> str:
    """Return the name of an image for people: its path, or its size."""
    return source if isinstance(source, str) else f"an image of {len(source):,} bytes"


# ---- without their bytes -------------------------------------------------------------------------------------------


def packed(images: Sequence[Image]) -> list[tuple[Any, ...]]:
    """Return images as plain tuples, without the bytes that their row holds."""
    return [(image.source if isinstance(image.source, str) else None, *image[1:]) for image in images]


def unpacked(images: Sequence[Sequence[Any]], row: Mapping[str, Any]) -> tuple[Image, ...]:
    """Return the images that `packed` made plain. row: theirs, whose columns hold the bytes."""
    values = images_in(row) if images else []
    return tuple(
        Image(source_of(value) if source is None else source, *rest)
        for (source, *rest), value in zip(images, values, strict=True)
    )
