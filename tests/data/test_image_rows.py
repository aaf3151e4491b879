"""Rows with images: every form they are given in, the tokens they become, and what is refused by name."""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import seeing
import torch
from PIL import Image
from random_base import config_of
from tiny import tiny_tokenizer
from transformers import AutoConfig, Gemma3Processor, LlavaProcessor, MllamaProcessor

from rlft.config.data import Data, Source
from rlft.config.run import Config
from rlft.data.encode import encode_prompt
from rlft.data.images import digest_of, source_of
from rlft.data.limits import NO_LIMITS, Limits
from rlft.data.prompts import exclude_prompts, hold_out, load_prompts
from rlft.data.table import PromptTable
from rlft.errors import ConfigError, DataError
from rlft.models import vision
from rlft.models.vision import image_reader
from rlft.monitor.panel import prompt_text
from rlft.monitor.tracking import table as table_of
from rlft.report.markup import conversation
from rlft.rewards.builtin import judge, reward_model
from rlft.rewards.overlap import columns_of
from rlft.runs.tables import dataset_columns, has_messages, shown_images, shown_prompt
from rlft.types import FinishReason, Prompt, Rollout

SEES = Limits(images=seeing.reader())
FILE, OTHER = seeing.file_of(3), seeing.file_of(2, (16, 40))
URL = "data:image/png;base64," + base64.b64encode(FILE).decode()


def encoded(row: dict[str, Any], limits: Limits = SEES, **data: Any) -> Prompt:
    tokenizer = seeing.tokenizer() if limits.images is not None else tiny_tokenizer()
    return encode_prompt(row, 0, Data("no file", **data), tokenizer, limits)


def shown(prompt: Prompt) -> str:
    """The prompt as text, with each image as [tokens]."""
    text = seeing.tokenizer().decode(prompt.ids)
    for image in prompt.images:
        text = text.replace("<|image_pad|>" * image.tokens, f"[{image.tokens}]", 1)
    return text.replace("<|vision_start|>", "").replace("<|vision_end|>", "")


# ---- forms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image",
    [FILE, bytearray(FILE), {"bytes": FILE, "path": None}, URL, {"url": URL}, {"bytes": FILE, "path": "gone.png"}],
    ids=["bytes", "bytearray", "datasets", "data URL", "url", "both"],
)
@pytest.mark.parametrize("column", ["image", "images", "part"])
def test_an_image_in_any_form_becomes_the_same_tokens(image: Any, column: str) -> None:
    row: dict[str, Any] = {"prompt": "How many?", column: [image] if column == "images" else image}
    if column == "part":
        row = {"prompt": [{"role": "user", "content": [{"type": "image", "image": image}, "How many?"]}]}
    prompt = encoded(row)
    assert shown(prompt) == "<|im_start|>user\n[6]How many?<|im_end|>\n<|im_start|>assistant\n"
    (found,) = prompt.images
    assert (found.source, found.digest, found.height, found.width) == (FILE, digest_of(FILE), 2, 3)
    assert set(prompt.ids[found.start : found.start + 6]) == {SEES.images.token}  # type: ignore[union-attr]


def test_a_picture_of_pillow_and_a_path() -> None:
    picture = seeing.picture(3)
    assert encoded({"prompt": "a", "image": picture}).images[0].tokens == 6
    with pytest.raises(DataError, match=r"image 0: .*/gone.png cannot be read \(No such file"):
        encoded({"prompt": "a", "image": Path("gone.png")})


def test_a_photograph_is_turned_as_its_camera_was(tmp_path: Path) -> None:
    picture, path = seeing.picture(3), tmp_path / "a.jpg"
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was held on its side
    picture.save(path, exif=exif)
    for image in (path, path.read_bytes(), Image.open(path)):
        (found,) = encoded({"prompt": "a", "image": image}).images
        assert (found.height, found.width) == (3, 2)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "url": URL},
        {"type": "image", "bytes": FILE},
        {"type": "image", "base64": URL.partition(",")[2]},
        {"type": "image_url", "image_url": {"url": URL}},
        {"type": "input_image", "image_url": URL},
    ],
)
def test_parts_of_other_libraries(part: dict[str, Any]) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, part, {"type": "text", "text": "b"}]}
    prompt = encoded({"messages": [message, {"role": "assistant", "content": "c"}]})
    assert shown(prompt) == "<|im_start|>user\na[6]b<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.images[0].source == FILE and prompt.recorded[0].text == "c"


def test_images_of_a_column_take_the_places_in_the_messages_or_the_first_of_the_user() -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    prompt = encoded({"prompt": turns, "images": [FILE, OTHER]})
    assert "user\n[6][10]u" in shown(prompt) and [image.tokens for image in prompt.images] == [6, 10]
    assert prompt.messages is not None and prompt.messages[1]["content"][:2] == [{"type": "image"}] * 2
    content = [{"type": "image"}, {"type": "text", "text": " and "}, {"type": "image"}]
    prompt = encoded({"prompt": [{"role": "user", "content": content}], "images": [OTHER, FILE]})
    assert "user\n[10] and [6]<" in shown(prompt)


def test_columns_may_have_other_names_and_rows_no_image() -> None:
    data = Data(rows=_bytes([{"q": "a", "pic": FILE}]), columns={"prompt": "q", "image": "pic"})
    assert load_prompts(data, seeing.tokenizer(), 0, limits=SEES).prompts[0].images[0].tokens == 6
    for row in ({"prompt": "a", "images": []}, {"prompt": "a", "images": None}, {"prompt": "a"}):
        assert not encoded(row).images


def test_a_dataset_is_read_without_decoding_its_images(tmp_path: Path) -> None:
    import datasets

    rows = [{"prompt": "a", "images": [seeing.picture(i)]} for i in range(3)]
    dataset = datasets.Dataset.from_list(rows)
    assert isinstance(dataset[0]["images"][0], Image.Image)
    loaded = load_prompts(Data(rows=dataset), seeing.tokenizer(), 0, limits=SEES).prompts
    assert [prompt.images[0].tokens for prompt in loaded] == [6] * 3
    assert len({prompt.images[0].digest for prompt in loaded}) == 3
    assert loaded[1].images[0].source == dataset.with_format("arrow")[1:2].to_pydict()["images"][0][0]["bytes"]


def test_pictures_of_rows_from_python_are_kept_in_the_run_folder(tmp_path: Path) -> None:
    from rlft.data.given import copied

    data = Data(rows=[{"prompt": "a", "image": seeing.picture(3)}, {"prompt": "b", "image": {"bytes": OTHER}}])
    before = load_prompts(data, seeing.tokenizer(), 0, limits=SEES).prompts
    after = load_prompts(copied(data, tmp_path, "data"), seeing.tokenizer(), 0, limits=SEES).prompts
    assert [prompt.images for prompt in before] == [prompt.images for prompt in after]
    assert before.digest() == after.digest() and after[1].images[0].source == OTHER


# ---- paths -------------------------------------------------------------------------------------------------------


def test_relative_paths_are_beside_the_data_file_or_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    (tmp_path / "data" / "pictures" / "a.png").write_bytes(FILE)
    (tmp_path / "here.png").write_bytes(OTHER)
    rows = [{"prompt": "a", "image": "pictures/a.png"}, {"prompt": "b", "image": "here.png"}]
    file = tmp_path / "data" / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    loaded = load_prompts(Data(str(file)), seeing.tokenizer(), 0, limits=SEES).prompts
    assert [prompt.images[0].source for prompt in loaded] == [
        str(tmp_path / "data" / "pictures" / "a.png"),
        str(tmp_path / "here.png"),
    ]
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "rows.jsonl").write_text(json.dumps(rows[0]))
    (tmp_path / "two" / "pictures").symlink_to(tmp_path / "data" / "pictures")
    both = Data(sources=(Source(str(file)), Source(str(tmp_path / "two" / "rows.jsonl"))))
    with pytest.raises(DataError, match=r"pictures/a\.png is in .*data.* and in .*two.*: give absolute paths"):
        load_prompts(both, seeing.tokenizer(), 0, limits=SEES)


def test_what_is_no_image_is_refused_by_its_form() -> None:
    for value, match in (
        (3, "3 is no image: want a path, bytes, a PIL image or a data URL"),
        ({"a": 1}, "is no image"),
        ("http://x.org/a.png", "is a URL: download images first"),
        ("data:image/png;base64,%%", "is a data URL whose base64 is broken"),
        (b"", "an image of 0 bytes is no image that can be read"),
        (FILE[:60], "an image of 60 bytes is no image that can be read"),
        (FILE[:-30], "no image that can be read"),
    ):
        with pytest.raises(DataError, match=f"^row 0: image 0: .*{match}"):
            encoded({"prompt": "a", "image": value})
    assert source_of("file:///a/b.png") == "/a/b.png"


# ---- rows that are refused ---------------------------------------------------------------------------------------

ASKED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
ANSWER = {"role": "assistant", "content": "c"}


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": ASKED}, "the prompt has 1 place for images, and the row has 0 images"),
        ({"prompt": ASKED, "images": [FILE, FILE]}, "the prompt has 1 place for images, and the row has 2 images"),
        ({"prompt": "a", "image": FILE, "images": [FILE]}, "has the columns images and image; leave out one"),
        ({"text": "a", "image": FILE}, "rows of plain text have no prompt to show images in"),
        ({"prompt_ids": [4, 5], "image": FILE}, "its prompt is token ids: give the prompt as text or messages"),
        ({"prompt": "<image>\na", "image": FILE}, "has the text <image>, which is not read as an image"),
        ({"prompt": [{"role": "system", "content": "s"}], "image": FILE}, "none of its messages is the user's"),
        (
            {"messages": [*ASKED, ANSWER, *ASKED], "images": [FILE, FILE]},
            "column messages has an image in an answer or behind one",
        ),
        (
            {"prompt": "a", "completion": [{"role": "assistant", "content": [{"type": "image", "image": FILE}]}]},
            "column completion has an image in an answer",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "image": FILE}]}], "image": OTHER},
            "parts of messages hold images, and a column too",
        ),
        ({"prompt_ids": [4, 105, 5]}, r"the prompt has <\|image_pad\|>, and the row no images"),
        ({"prompt": "a", "completion": "b<|image_pad|>"}, r"the completion has <\|image_pad\|>, the place of an image"),
        ({"prompt": "a", "image": Image.new("RGB", (900, 2))}, "image 0: 900 x 2 pixels: absolute aspect ratio"),
    ],
)
def test_a_row_that_cannot_be_shown_is_named(row: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=f"^row 0.*{match}"):
        encoded(row)


def test_sides_with_different_images_are_refused_and_equal_ones_shared() -> None:
    def side(image: bytes, said: str) -> list[dict[str, Any]]:
        return [
            {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "a"}]},
            {"role": "assistant", "content": said},
        ]

    prompt = encoded({"chosen": side(FILE, "x"), "rejected": side(FILE, "y")})
    assert shown(prompt).count("[6]") == 1 and [each.text for each in prompt.recorded] == ["x", "y"]
    with pytest.raises(DataError, match="chosen and rejected have different images: both sides of a pair continue one"):
        encoded({"chosen": side(FILE, "x"), "rejected": side(OTHER, "y")})


@pytest.mark.parametrize(
    "row", [{"prompt": "a", "image": FILE}, {"prompt": ASKED}, {"prompt": ASKED, "images": [FILE]}]
)
def test_a_model_of_text_refuses_images(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"row 0: the row has images, and the model takes text alone; .* data.columns"):
        encoded(row, NO_LIMITS)


def test_a_prompt_that_is_too_long_says_how_much_of_it_is_images() -> None:
    data = Data(rows=[{"prompt": "a", "images": [FILE, OTHER]}], max_prompt_tokens=20, long_prompts="error")
    with pytest.raises(
        DataError, match=r"tokens \(16 of its 2 images \(6 to 10 each\); data.max_pixels lowers that\), d"
    ):
        load_prompts(data, seeing.tokenizer(), 0, limits=SEES)
    with pytest.raises(
        DataError, match=r"has \d+ tokens \(6 of its image; data.max_pixels lowers that\), and the model's"
    ):
        encoded({"prompt": "a", "image": FILE}, SEES._replace(context=12))


# ---- identity, rewards, limits -----------------------------------------------------------------------------------


def table(*images: bytes) -> PromptTable:
    rows = [{"prompt": "How many?", "image": image} for image in images]
    return load_prompts(Data(rows=_bytes(rows)), seeing.tokenizer(), 0, limits=SEES).prompts


def _bytes(rows: list[dict[str, Any]]) -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist(rows)


def test_prompts_are_told_apart_by_their_images() -> None:
    files = [seeing.file_of(i) for i in (0, 1, 2, 1)]
    prompts = table(*files)
    assert len({prompt.ids for prompt in prompts}) == 1
    keys = prompts.keys()
    assert keys[1] == keys[3] and len(set(keys)) == 3
    rest, held = hold_out(prompts, 2, seed=0)
    assert not {prompt.images[0].digest for prompt in rest} & {prompt.images[0].digest for prompt in held}
    assert len(exclude_prompts(prompts, table(files[1]))) == 2
    assert prompts.digest() != table(*files[:3], files[0]).digest()
    assert [prompt.images[0].source for prompt in prompts] == files


def test_rewards_get_images_in_one_form() -> None:
    seen, blind = encoded({"prompt": "a", "image": {"bytes": FILE}}), encoded({"prompt": "a"})
    rollouts = [Rollout(p, (5,), (True,), None, "x", FinishReason.STOP, 0, 0, 0) for p in (seen, blind)]
    assert columns_of(rollouts)["images"] == [[FILE], None]
    assert "images" not in columns_of(rollouts[1:])


def test_images_are_shown_by_name_and_refused_by_what_reads_text() -> None:
    named, bare = encoded({"prompt": ASKED, "image": {"bytes": FILE}}), encoded({"prompt": "a"})
    text = shown_prompt(named)
    assert has_messages(named) and "[image]a" in conversation(text) and prompt_text(text, True) == "[image]a"
    assert json.loads(dataset_columns(named) or "") == {"images": [f"{len(FILE):,} bytes, {digest_of(FILE)[:8]}"]}
    rollouts = [Rollout(p, (5,), (True,), None, "x", FinishReason.STOP, 0, 0, 0) for p in (named, bare)]
    rows = table_of(1, rollouts, {})
    assert rows[0]["images"] == shown_images(named)[0] and rows[1]["images"] == ""
    assert "images" not in table_of(1, rollouts[1:], {})[0]
    messages = [dict(message) for message in named.messages or ()]
    with pytest.raises(ValueError, match="the prompt has images, and the judge is asked in text alone"):
        judge._shown(messages)
    with pytest.raises(ValueError, match="the prompt has images, and the reward model reads text alone"):
        reward_model._encode(seeing.tokenizer(), messages, "x")


def test_pixel_limits_reach_the_processor(tmp_path: Path) -> None:
    folder = seeing.save(tmp_path)
    config = seeing.config_of("qwen2_vl")

    def tokens(**limits: int) -> int:
        reader = image_reader(str(folder), config, Data("x", **limits))
        return encoded({"prompt": "a", "image": seeing.picture(3, (96, 64))}, Limits(images=reader)).images[0].tokens

    assert tokens() == 12 and tokens(max_pixels=256) == 2 and tokens(max_pixels=4096) == 54
    with pytest.raises(ConfigError, match=r"data.min_pixels and data.max_pixels: .* at least 2000 and at most 1024"):
        tokens(min_pixels=2000)
    with pytest.raises(ConfigError, match=r"data.min_pixels = 9: more than data.max_pixels = 8"):
        Data("x", min_pixels=9, max_pixels=8)
    with pytest.raises(ConfigError, match=r"eval.data.max_pixels differs from data.max_pixels"):
        Config(model="m", data="d", out="o", steps=1, eval={"rows": 1, "data": {"path": "e", "max_pixels": 5}})
    text = config_of("llama")
    assert image_reader("m", text, Data("x")) is None
    with pytest.raises(ConfigError, match=r'data.max_pixels = 5: model = "m" takes text alone; leave it out'):
        image_reader("m", text, Data("x", max_pixels=5))
    for name, value in (("patch_size", 8), ("temporal_patch_size", 1), ("do_resize", False)):
        (folder / "preprocessor_config.json").write_text(json.dumps({**seeing.PROCESSOR, name: value}))
        with pytest.raises(ConfigError, match=rf"its image processor \(\w+\) has {name} = {value}, and its vision"):
            tokens()
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match="its image processor"):
        tokens()


def test_llava_has_the_ids_of_its_own_processor() -> None:
    tokenizer, reader = seeing.tokenizer("llava"), seeing.reader("llava")
    processor = LlavaProcessor(reader.processor, tokenizer, 4, "default", None, "<image>", 1)
    pictures = [seeing.picture(3), seeing.picture(2, (16, 40))]
    for count in range(3):
        row: dict[str, Any] = {"prompt": "Which?", "images": pictures[:count]}
        prompt = encode_prompt(row, 0, Data("no file"), tokenizer, Limits(images=reader))
        text = tokenizer.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
        given: dict[str, Any] = {"images": [pictures[:count]]} if count else {}
        made = processor(text=[text], add_special_tokens=False, return_tensors="pt", **given)
        assert list(prompt.ids) == made["input_ids"][0].tolist() and len(prompt.images) == count
        if count:
            assert torch.equal(reader.given(prompt.images)["pixel_values"], made["pixel_values"])


@pytest.mark.parametrize(("kind", "wide", "high"), [("mistral3", (3, 2), (2, 5)), ("pixtral", (6, 4), (4, 10))])
def test_a_row_of_pixtrals_tower_ends_with_a_word(kind: str, wide: Any, high: Any) -> None:
    """As PixtralProcessor writes images, which wants torchvision. A token is 8 pixels a side, or 4."""
    tokenizer, reader = seeing.tokenizer(kind), seeing.reader(kind)
    row = {"prompt": "Which?", "images": [seeing.picture(3), seeing.picture(2, (16, 40))]}
    prompt = encode_prompt(row, 0, Data("no file"), tokenizer, Limits(images=reader))

    def shown(columns: int, rows: int) -> str:
        return "[IMG_BREAK]".join(["[IMG]" * columns] * rows) + "[IMG_END]"

    text = f"<|im_start|>user\n{shown(*wide)}{shown(*high)}Which?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.ids == tuple(tokenizer.encode(text, add_special_tokens=False))
    assert [(image.width, image.height) for image in prompt.images] == [wide, high]
    assert reader.given(prompt.images)["image_sizes"].tolist() == [[16, 24], [40, 16]]


def test_what_llava_and_mistral_3_do_not_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 0: the tokenizer has no \[IMG_BREAK\], which stands behind tokens of an"):
        without = Limits(images=seeing.reader("mistral3"))
        encode_prompt({"prompt": "a", "image": FILE}, 0, Data("no file"), seeing.tokenizer("llava"), without)
    folder, config = seeing.save(tmp_path, "llava"), seeing.config_of("llava")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**seeing.CLIP, "crop_size": {"height": 8, "width": 8}}))
    with pytest.raises(ConfigError, match=r"makes pictures of 8 x 8 pixels, and its vision tower needs 16 x 16"):
        image_reader(str(folder), config)
    config.vision_config = AutoConfig.for_model("dinov2")
    with pytest.raises(ConfigError, match="a LLaVA with a vision tower of dinov2, which is not supported yet"):
        image_reader(str(folder), config)
    config = seeing.config_of("mistral3")
    config.vision_config = AutoConfig.for_model("clip_vision_model")
    with pytest.raises(ConfigError, match="a Mistral 3 with a vision tower of clip_vision_model, which is not"):
        image_reader(str(folder), config)
    file.write_text(json.dumps({**seeing.LINES, "size": {"height": 8, "width": 8}}))
    with pytest.raises(ConfigError, match="and its vision tower needs a longest_edge"):
        image_reader(str(folder), seeing.config_of("pixtral"))


def test_llama_3_2_vision_has_a_token_for_each_image() -> None:
    tokenizer, reader = copy.deepcopy(seeing.tokenizer("mllama")), seeing.reader("mllama")
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    processor, limits = MllamaProcessor(reader.processor, tokenizer), Limits(vocabulary=reader.token, images=reader)
    pictures = [seeing.picture(3), seeing.picture(2, (16, 60)), seeing.picture(4, (12, 12))]
    row: dict[str, Any] = {"prompt": "Which?", "images": pictures}
    prompt = encode_prompt(row, 0, Data("no file"), tokenizer, limits)
    text = tokenizer.bos_token + tokenizer.apply_chat_template(
        prompt.messages, tokenize=False, add_generation_prompt=True
    )
    made = processor(images=[pictures], text=[text], add_special_tokens=False, return_tensors="pt")
    assert list(prompt.ids) == made["input_ids"][0, 1:].tolist() and prompt.ids.count(reader.token) == 3
    assert [image.width for image in prompt.images] == made["cross_attention_mask"][0, -1].sum(-1).tolist() == [2, 4, 1]
    ours = reader.given(prompt.images)
    assert all(torch.equal(ours[name].flatten(0, 1), made[name].flatten(0, 1)) for name in ours)
    with pytest.raises(
        DataError, match=r"row 0: the prompt begins with <\|image\|>, and the tokenizer would put <\|begin\|>"
    ):
        encode_prompt({"prompt": "<|image|>a", "image": FILE}, 0, Data("x", chat="never"), tokenizer, limits)
    with pytest.raises(DataError, match=r"row 0: the completion has <\|image\|>, the place of an image: remove it"):
        said = {"prompt": "a", "completion": "<|image|>", "image": FILE}
        encode_prompt(said, 0, Data("x"), tokenizer, limits)


GEMMA = Limits(images=seeing.reader("gemma3"))


def gemma(row: dict[str, Any], tokenizer: Any = None, **data: Any) -> Prompt:
    return encode_prompt(row, 0, Data("no file", **data), tokenizer or seeing.tokenizer("gemma3"), GEMMA)


def test_gemma_3_has_the_ids_of_its_own_processor() -> None:
    tokenizer = copy.deepcopy(seeing.tokenizer("gemma3"))
    begin, end, place = seeing.GEMMA_MARKS
    tokens = {"boi_token": begin, "eoi_token": end, "image_token": place}
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    assert GEMMA.images is not None
    processor = Gemma3Processor(GEMMA.images.processor, tokenizer, image_seq_length=4)
    pictures = [seeing.picture(3), seeing.picture(2, (16, 40))]
    for count, content in ((2, "Which?"), (1, [{"type": "text", "text": "a"}, {"type": "image"}, "b"]), (0, "c")):
        messages = [{"role": "user", "content": content}]
        prompt = gemma({"prompt": messages, "images": pictures[:count]} if count else {"prompt": messages})
        text = tokenizer.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
        given = {"images": [pictures[:count]]} if count else {}
        assert list(prompt.ids) == processor(text=[text], add_special_tokens=False, **given)["input_ids"][0]
        assert len(prompt.images) == count and all(image.tokens == 4 for image in prompt.images)
        if count:
            pixels = processor(text=[text], return_tensors="pt", **given)["pixel_values"]
            assert torch.equal(GEMMA.images.given(prompt.images)["pixel_values"], pixels)
    recorded = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "b"}]
    assert gemma({"messages": recorded, "image": FILE}).ids == gemma({"prompt": "Which?", "image": FILE}).ids


def test_what_gemma_3_does_not_read_is_named(tmp_path: Path) -> None:
    begin, _, place = seeing.GEMMA_MARKS
    with pytest.raises(DataError, match=r"row 0: the prompt has 1 place for images, and the row has 0 images"):
        gemma({"prompt": f"a {begin}"}, chat="never")
    with pytest.raises(DataError, match=rf"row 0: the prompt has {place}, which stands behind {begin}"):
        gemma({"prompt": place, "image": FILE}, chat="never")
    shown = gemma({"prompt": f"a {begin} b", "image": FILE}, chat="never")
    assert len(shown.ids) == len("a \n\n") + 6 + len("\n\n b") and shown.images[0].start == 5
    marked = copy.deepcopy(seeing.tokenizer("gemma3"))
    marked.chat_template = seeing.tokenizer("gemma3").chat_template + "{% generation %}{% endgeneration %}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=r"writes text around images, which the marks would not follow"):
        gemma({"messages": messages, "image": FILE}, marked)
    folder, config = seeing.save(tmp_path, "gemma3"), seeing.config_of("gemma3")
    for name, value, message in (
        ("do_pan_and_scan", True, "do_pan_and_scan = True, which shows crops beside each image"),
        ("size", {"height": 8, "width": 8}, "makes pictures of 8 x 8 pixels, and its vision tower needs 16 x 16"),
        ("do_resize", False, "has do_resize = False, and its vision tower needs True"),
    ):
        (folder / "preprocessor_config.json").write_text(json.dumps({**seeing.settings("gemma3"), name: value}))
        with pytest.raises(ConfigError, match=message):
            image_reader(str(folder), config)
    with pytest.raises(
        ConfigError, match=r'data.max_pixels = 9: model = "m" has an image processor without such a limit; leave it out'
    ):
        image_reader("m", config, Data("x", max_pixels=9))
    (folder / "preprocessor_config.json").write_text(json.dumps(seeing.settings("gemma3")))
    config.text_config.sliding_window = 3
    with pytest.raises(ConfigError, match=r"an image of 4 tokens .* is longer than the window of 3"):
        image_reader(str(folder), config)


def test_a_machine_without_pillow_gets_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "version", lambda _: None)
    with pytest.raises(ConfigError, match='model = "m" takes images, which need Pillow: pip install pillow'):
        image_reader("m", seeing.config_of("qwen2_vl"))


@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "mllama", "llava"])
def test_text_needs_no_words_for_images_in_the_tokenizer(kind: str) -> None:
    """A model with images trains on text with the tokenizer of another one."""
    reader, plain = copy.copy(seeing.reader(kind)), tiny_tokenizer()
    reader.token = len(plain) + 9
    if kind == "gemma3":
        reader._frame = (reader.token + 1, reader.token + 2)  # type: ignore[attr-defined]
    assert plain.convert_ids_to_tokens(reader.token) is None
    assert reader.written("How many?", plain, begins=True) == "How many?"
