"""Tiny random vision-language models with a character tokenizer and an image processor, and pictures of squares."""

from __future__ import annotations

import functools
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoImageProcessor, PreTrainedTokenizerFast

from rlft.config.run import Lora
from rlft.data.image_readers import ImageReader
from rlft.models.image_processor import reader_of
from rlft.models.kind import class_of
from rlft.models.load import attach_lora, pad_rows
from rlft.models.policy import Policy

GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""With images of any size."""
FUSED = (*GRIDS, "gemma3", "llava", "pixtral", "mistral3")
KINDS = (*FUSED, "mllama")
"""Types of models; "pixtral" is a LLaVA with a tower of Pixtral."""
LINE_MARKS = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
GEMMA_MARKS = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLACES = dict.fromkeys(KINDS, "<|vision_start|><|image_pad|><|vision_end|>") | {
    "gemma3": GEMMA_MARKS[0],
    "llava": "<image>",
    "pixtral": "[IMG]",
    "mistral3": "[IMG]",
    "mllama": "<|image|>",
}
"""What templates write in the place of an image."""
VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 16, "mlp_ratio": 2, "depth": 2},
    "qwen2_5_vl": {
        **{"hidden_size": 16, "intermediate_size": 24, "depth": 2},
        **{"window_size": 16, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": {
        **{"hidden_size": 16, "intermediate_size": 24, "depth": 3},
        **{"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
    },
}
SQUARE = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": 16, "patch_size": 4},
}
"""A tower of 16 patches."""
SQUARES = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 16, "width": 16}, "do_resize": True}
CLIP = {
    **{"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "do_center_crop": True},
    "crop_size": {"height": 16, "width": 16},
}
TILES = {
    **{"image_processor_type": "MllamaImageProcessor", "size": {"height": 16, "width": 16}},
    **{"max_image_tiles": 4, "do_resize": True, "do_pad": True},
}
LINES = {
    **{"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 40}},
    "patch_size": {"height": 4, "width": 4},
}
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 1024},
}


@functools.cache
def tokenizer(kind: str = "qwen2_vl") -> PreTrainedTokenizerFast:
    """The character tokenizer with the marks of images, and a template that shows them."""
    made = tiny_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *_marks(kind)]})
    made.chat_template = TEMPLATE.replace(PLACES["qwen2_vl"], PLACES[kind])
    return made


def _marks(kind: str) -> list[str]:
    others = {"gemma3": GEMMA_MARKS, "llava": ["<image>"], "pixtral": LINE_MARKS, "mistral3": LINE_MARKS}
    others["mllama"] = ["<|image|>"]
    return others.get(kind, MARKS)


def config_of(kind: str, head: int = 16) -> Any:
    """The config of a model of three layers, whose widths bitsandbytes takes on a CPU. head: size of a head."""
    text = {
        **{"vocab_size": len(tokenizer(kind)), "hidden_size": 4 * head, "intermediate_size": 64},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head, "max_position_embeddings": 512},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2, "num_hidden_layers": 3},
    }
    ids = tokenizer(kind).convert_tokens_to_ids(_marks(kind))
    if kind == "gemma3":
        return _gemma3(text, ids)
    if kind == "mllama":
        return _mllama(text, ids[0])
    if kind not in GRIDS:
        return _llava(kind, text, ids[0])
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    rope = {"mrope_section": [head // 8, head * 3 // 16, head * 3 // 16], "rope_type": "default", "rope_theta": 1e4}
    vision = {
        **{"num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3},
        **VISION[kind],
    }
    vision["hidden_size" if kind == "qwen2_vl" else "out_hidden_size"] = 4 * head
    more = dict(zip(names, ids, strict=True))
    text["rope_parameters"] = rope
    return AutoConfig.for_model(kind, text_config=text, vision_config=vision, tie_word_embeddings=False, **more)


def _gemma3(text: dict[str, Any], ids: list[int]) -> Any:
    """Windows of 6 tokens in two of three layers, images of 4."""
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    more = dict(zip(("boi_token_index", "eoi_token_index", "image_token_index"), ids, strict=True))
    return AutoConfig.for_model(
        "gemma3",
        text_config={**text, "sliding_window": 6, "layer_types": layers, "query_pre_attn_scalar": text["head_dim"]},
        vision_config={**SQUARE, "vision_use_head": False},
        mm_tokens_per_image=4,
        initializer_range=0.2,
        tie_word_embeddings=False,
        **more,
    )


def _llava(kind: str, text: dict[str, Any], image: int) -> Any:
    """LLaVA over Llama with a tower of CLIP, over Mistral with one of Pixtral, and Mistral 3, which merges 2 x 2."""
    tower: dict[str, Any] = {**SQUARE, "model_type": "clip_vision_model"}
    if kind != "llava":
        tower = {**SQUARE, "model_type": "pixtral", "head_dim": SQUARE["hidden_size"] // 2, "image_size": 40}
    return AutoConfig.for_model(
        "mistral3" if kind == "mistral3" else "llava",
        text_config={**text, "model_type": "llama" if kind == "llava" else "mistral"},
        vision_config={**tower, "initializer_range": 0.2},
        image_token_index=image,
        vision_feature_layer=-1 if kind == "mistral3" else -2,
        tie_word_embeddings=False,
        **({} if kind == "llava" else {"vision_feature_select_strategy": "full"} if kind == "pixtral" else {}),
    )


def _mllama(text: dict[str, Any], image: int) -> Any:
    """Tiles of 16 patches, up to 4 of an image; the token of an image is the first beyond the vocabulary."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    more = {"vocab_size": image, "cross_attention_layers": [1], "rope_parameters": rope, "head_dim": None}
    vision = {name: SQUARE[name] for name in ("hidden_size", "intermediate_size", "image_size", "patch_size")}
    tower = {"num_hidden_layers": 3, "num_global_layers": 1, "attention_heads": 2, "initializer_range": 0.2}
    indices = {"intermediate_layers_indices": [0, 2], "vision_output_dim": 3 * SQUARE["hidden_size"]}
    return AutoConfig.for_model(
        "mllama",
        text_config={name: value for name, value in {**text, **more}.items() if value is not None},
        vision_config={**vision, **tower, **indices},
        image_token_index=image,
        tie_word_embeddings=False,
    )


def base_of(kind: str, dtype: torch.dtype = torch.float32, head: int = 16) -> Any:
    """A frozen model with random weights, whose embedding and head are padded as those of a loaded one."""
    config = config_of(kind, head)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = class_of(config).from_config(config, attn_implementation="sdpa").to(dtype).eval().requires_grad_(False)
        for name, parameter in base.named_parameters():  # 0 in a new model
            if "gate" in name.split(".")[-1] or name.endswith("mm_input_projection_weight"):
                torch.nn.init.normal_(parameter, std=0.7 if "gate" in name else 0.2)
    pad_rows(base.get_input_embeddings().weight, base.get_output_embeddings().weight)
    return base


def save(folder: Path, kind: str = "qwen2_vl", head: int = 16) -> Path:
    """Write a model, its tokenizer and its image processor into a folder; returns it."""
    base_of(kind, head=head).save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings(kind)))
    return folder


def settings(kind: str) -> dict[str, Any]:
    """The settings of the image processor of a model of `base_of`."""
    if kind in ("pixtral", "mistral3"):
        return LINES
    return {"gemma3": SQUARES, "llava": CLIP, "mllama": TILES}.get(kind, PROCESSOR)


@functools.cache
def reader(kind: str = "qwen2_vl") -> ImageReader:
    """What reads images for a model of `base_of`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings(kind)))
        processor = AutoImageProcessor.from_pretrained(folder)
    return reader_of("model", processor, config_of(kind))


def policy_of(
    kind: str,
    dtype: torch.dtype = torch.float64,
    trained: float = 0.3,
    device: str = "cpu",
    head: int = 16,
    vision: bool = False,
) -> Policy:
    """A policy over a random model whose adapter is not fresh. trained: size of the noise in the adapter's B. vision:
    its tower has an adapter too."""
    base = base_of(kind, dtype, head).to(device)
    policy = Policy(attach_lora(base, Lora(rank=4, alpha=8, vision=vision), 0), dtype=dtype, images=reader(kind))
    g = torch.Generator().manual_seed(7)
    for name, tensor in policy.adapter().items():
        if ".lora_B." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=g, dtype=torch.float64) * trained)
    return policy


def picture(count: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """A white picture of `count` dark squares."""
    made = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(made)
    for i in range(count):
        x, y = 1 + 5 * i % (size[0] - 4), 2 + 4 * (5 * i // (size[0] - 4))
        draw.rectangle((x, y, x + 2, y + 2), fill=(30 * i % 200, 0, 90))
    return made


def file_of(count: int, size: tuple[int, int] = (24, 16)) -> bytes:
    """The picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture(count, size).save(buffer, format="PNG")
    return buffer.getvalue()
