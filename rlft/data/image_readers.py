"""Read the images of rows for a model: the tokens that stand for them, and what its vision tower takes.

A chat template writes a place for an image, which is replaced by as many tokens as the image has features. What else
the processor of a model writes around them is added to the text before it is encoded.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlft.data.images import bytes_of, decoded, digest_of, name_of, source_of
from rlft.errors import DataError
from rlft.types import Image, Layout, Prompt


class ImageReader(ABC):
    """Reads images for one model. Subclasses say how many tokens an image has, and what its tower takes."""

    layout: Layout
    """Of the tokens of an image."""
    written_tokens = 1
    """Tokens that the text of a prompt has in the place of an image."""

    def __init__(self, processor: Any, token: int, video: int | None = None) -> None:
        """processor: an image processor of transformers. token: id of an image's place in a prompt. video: of a
        video's, which no prompt or completion may have; None: the model takes none."""
        self.processor, self.token, self._video = processor, token, video
        self.places = frozenset({token} if video is None else {token, video})
        """Ids that are no words: they stand for images and videos."""
        self.beyond = frozenset[int]()
        """Those of them that the embedding has rows for beyond the vocabulary."""
        self._size = lru_cache(maxsize=4096)(self._size_of)

    @abstractmethod
    def _size_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of the tokens of an image of `size` (width, height). Raises ValueError."""

    @abstractmethod
    def given(self, images: Sequence[Image]) -> dict[str, Any]:
        """Return the arguments by which the tower takes images. Raises DataError for a file that has changed."""

    @abstractmethod
    def patches(self, image: Image) -> int:
        """Return the number of patches of an image in the tower."""

    @property
    @abstractmethod
    def most_patches(self) -> int:
        """Patches of the largest image that the processor's limits allow."""

    def written(self, text: str, tokenizer: Any, begins: bool = False) -> str:
        """Return the text of a prompt with what the model's processor writes around places of images.

        begins: the tokenizer adds its special tokens. Raises DataError for a text that would become other tokens.
        """
        return text

    def expanded(
        self, ids: Sequence[int], values: Sequence[Any], folders: Sequence[Path] = ()
    ) -> tuple[tuple[int, ...], tuple[Image, ...]]:
        """Return the ids of a prompt with all tokens of its images, and the images.

        ids: with one place per image. values: the images as the row has them. Raises DataError when places and images
        differ in number, and for an image that cannot be read.
        """
        if self._video in ids:
            raise DataError("the prompt has a place for a video: videos are not supported; leave the row out")
        places = sum(token == self.token for token in ids)
        if places != len(values):
            raise DataError(
                f"the prompt has {places} place{'' if places == 1 else 's'} for images, and the row has "
                f"{len(values)} image{'' if len(values) == 1 else 's'}: give one for each",
                reason="images",
            )
        whole: list[int] = []
        images: list[Image] = []
        place = 0
        while place < len(ids):
            if ids[place] == self.token:
                images.append(self._image(values[len(images)], len(whole), len(images), folders))
                whole += self._tokens(images[-1], ids[place : place + self.written_tokens])
                place += self.written_tokens
            else:
                whole.append(ids[place])
                place += 1
        return tuple(whole), tuple(images)

    def _tokens(self, image: Image, place: Sequence[int]) -> list[int]:
        """Return the tokens of an image. place: those that the text has for it."""
        return [self.token] * image.tokens

    def _image(self, value: Any, start: int, number: int, folders: Sequence[Path]) -> Image:
        try:
            source = source_of(value, folders)
            data = bytes_of(source)
            size = decoded(data, name_of(source)).size
            try:
                height, width = self._size(size)
            except ValueError as error:  # too long and narrow, say
                raise DataError(f"{size[0]} x {size[1]} pixels: {error}", reason="images") from None
        except DataError as error:
            raise DataError(f"image {number}: {error}", reason=error.reason) from None
        return Image(source, digest_of(data), start, height, width, self.layout)

    def _processed(self, image: Image) -> Any:
        """Return what the processor makes of an image. Raises DataError when the file has changed."""
        data = bytes_of(image.source)
        if digest_of(data) != image.digest:
            raise DataError(
                f"{name_of(image.source)} has changed since its row was read: its bytes have another digest; start the "
                f"run again, or put the file back"
            )
        return self._made(decoded(data, name_of(image.source)))

    def _made(self, picture: Any) -> Any:
        """Return what the processor makes of a picture."""
        return self.processor([picture], return_tensors="pt")

    def _blank(self, size: tuple[int, int]) -> Any:
        """Return what the processor makes of a picture of `size`, as far as that does not depend on its pixels."""
        from PIL import Image as Pillow

        return self._made(Pillow.new("RGB", size))


class GridReader(ImageReader):
    """Reads images for Qwen2-VL and its successors, whose tower takes patches of images of any size."""

    layout = "axes"

    @property
    def _merge(self) -> int:
        return int(self.processor.merge_size)

    def _size_of(self, size: tuple[int, int]) -> tuple[int, int]:
        (grid,) = self._blank(size)["image_grid_thw"].tolist()
        return grid[1] // self._merge, grid[2] // self._merge

    @property
    def most_patches(self) -> int:
        """Patches of the largest image that the processor's limits allow."""
        return int(self.processor.size["longest_edge"]) // int(self.processor.patch_size) ** 2

    def grid(self, image: Image) -> tuple[int, int, int]:
        """Return the patches of an image in time, rows and columns."""
        return 1, image.height * self._merge, image.width * self._merge

    def patches(self, image: Image) -> int:
        """Return the number of patches of an image."""
        return image.tokens * self._merge**2

    def given(self, images: Sequence[Image]) -> dict[str, Any]:
        """Return the patches of images, [patches, values] float32, and their grids, [images, 3] int64."""
        import torch

        made = [self._processed(image) for image in images]
        for image, each in zip(images, made, strict=True):
            assert each["image_grid_thw"].tolist() == [list(self.grid(image))], "the processor's settings"
        return {name: torch.cat([each[name] for each in made]) for name in ("pixel_values", "image_grid_thw")}


class SquareReader(ImageReader):
    """Reads images for towers that take squares of one size: LLaVA, Gemma 3."""

    def __init__(self, processor: Any, token: int, layout: Layout, patches: int, tokens: int) -> None:
        """patches: of an image in the tower. tokens: of an image in a prompt."""
        super().__init__(processor, token)
        self.layout, self._patches, self._features = layout, patches, tokens

    def _size_of(self, size: tuple[int, int]) -> tuple[int, int]:
        side = math.isqrt(self._features)
        return (side, side) if side**2 == self._features else (1, self._features)

    @property
    def most_patches(self) -> int:
        """Patches of every image."""
        return self._patches

    def patches(self, image: Image) -> int:
        """Return the number of patches of an image."""
        return self._patches

    def given(self, images: Sequence[Image]) -> dict[str, Any]:
        """Return the pixels of images, [images, 3, side, side] float32."""
        import torch

        return {"pixel_values": torch.cat([self._processed(image)["pixel_values"] for image in images])}


class FramedReader(SquareReader):
    """Reads images for Gemma 3, whose processor writes line breaks, a beginning and an end around each image."""

    def __init__(self, processor: Any, token: int, patches: int, tokens: int, frame: tuple[int, int]) -> None:
        """frame: ids before and behind the tokens of an image; the template writes the first one for its place."""
        super().__init__(processor, token, "block", patches, tokens)
        self._frame = frame

    def written(self, text: str, tokenizer: Any, begins: bool = False) -> str:
        """Return the text with a place, framed, for each beginning of an image."""
        begin, place, end = tokenizer.convert_ids_to_tokens([self._frame[0], self.token, self._frame[1]])
        if place is not None and place in text:
            raise DataError(f"the prompt has {place}, which stands behind {begin} alone: remove it", reason="images")
        return text if begin is None else text.replace(begin, f"\n\n{begin}{place}{end}\n\n")


class LineReader(ImageReader):
    """Reads images for Pixtral's tower (Mistral 3), of any size; a word ends each row, and another one the image."""

    layout = "lines"
    written_tokens = 3
    ENDS = ("[IMG_BREAK]", "[IMG_END]")

    def __init__(self, processor: Any, token: int, patch: int, merge: int) -> None:
        """patch: side of a patch in pixels. merge: patches on a side of the square that becomes one feature."""
        super().__init__(processor, token)
        self._step, self._merge = patch * merge, merge

    def _size_of(self, size: tuple[int, int]) -> tuple[int, int]:
        ((height, width),) = self._blank(size)["image_sizes"]
        return int(height) // self._step, int(width) // self._step

    def _made(self, picture: Any) -> Any:
        return self.processor([picture], patch_size=self._step, return_tensors="pt")

    @property
    def most_patches(self) -> int:
        """Patches of the largest image that the processor's limit allows."""
        return (-(-int(self.processor.size["longest_edge"]) // self._step) * self._merge) ** 2

    def patches(self, image: Image) -> int:
        """Return the number of patches of an image."""
        return image.height * image.width * self._merge**2

    def written(self, text: str, tokenizer: Any, begins: bool = False) -> str:
        """Return the text with both words that end rows behind each place, from which `expanded` has their ids."""
        place = tokenizer.convert_ids_to_tokens(self.token)
        if place is None or place not in text:
            return text
        added = tokenizer.get_added_vocab()
        for end in self.ENDS:
            if end not in added:
                raise DataError(f"the tokenizer has no {end}, which stands behind tokens of an image", reason="images")
        return text.replace(place, "".join((place, *self.ENDS)))

    def _tokens(self, image: Image, place: Sequence[int]) -> list[int]:
        _, row_end, end = place
        rows = [*[self.token] * image.width, row_end] * image.height
        return [*rows[:-1], end]

    def given(self, images: Sequence[Image]) -> dict[str, Any]:
        """Return the pixels of images, padded to the largest, [images, 3, height, width] float32, and their sizes."""
        import torch
        from torch.nn.functional import pad

        made = [self._processed(image) for image in images]
        sizes = torch.cat([torch.as_tensor(each["image_sizes"]).view(1, 2) for each in made])
        height, width = sizes.amax(0).tolist()
        pixels = [each["pixel_values"] for each in made]
        padded = [pad(each, (0, width - each.shape[3], 0, height - each.shape[2])) for each in pixels]
        return {"pixel_values": torch.cat(padded), "image_sizes": sizes}


class TileReader(ImageReader):
    """Reads images for Llama 3.2 Vision, which cuts them into tiles; its decoder has one token for each image."""

    layout = "cross"

    def __init__(self, processor: Any, token: int, patches: int) -> None:
        """patches: of a tile in the tower, with the state in front of them."""
        super().__init__(processor, token)
        self.beyond = self.places
        self._patches = patches * int(processor.max_image_tiles)

    def _size_of(self, size: tuple[int, int]) -> tuple[int, int]:
        ((tiles,),) = self._blank(size)["num_tiles"]
        return 1, int(tiles)

    @property
    def most_patches(self) -> int:
        """Patches of every image: those of black tiles are computed too."""
        return self._patches

    def patches(self, image: Image) -> int:
        """Return the number of patches of an image."""
        return self._patches

    def written(self, text: str, tokenizer: Any, begins: bool = False) -> str:
        """Return the text as it is. Raises DataError where the model's processor has the image before the first
        token."""
        place = tokenizer.convert_ids_to_tokens(self.token)
        if begins and place is not None and text.startswith(place):
            raise DataError(
                f"the prompt begins with {place}, and the tokenizer would put {tokenizer.bos_token} before it, where "
                f"the model's processor has it behind: give the prompt as messages, or begin with text",
                reason="images",
            )
        return text

    def given(self, images: Sequence[Image]) -> dict[str, Any]:
        """Return tiles [images, 1, tiles, 3, side, side] float32, and which of them an image fills, in two forms."""
        import torch

        made = [self._processed(image) for image in images]
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        return {name: torch.cat([torch.as_tensor(each[name]) for each in made]) for name in names}


def advice(prompt: Prompt) -> str:
    """Return what to do about a prompt that its images make long; "" for one without images."""
    tokens = [image.tokens for image in prompt.images]
    if not tokens:
        return ""
    each = f"{tokens[0]}" if len(set(tokens)) == 1 else f"{min(tokens)} to {max(tokens)}"
    of = "of its image" if len(tokens) == 1 else f"of its {len(tokens)} images ({each} each)"
    lower = "; data.max_pixels lowers that" if prompt.images[0].layout == "axes" else ""
    return f" ({sum(tokens)} {of}{lower})"
