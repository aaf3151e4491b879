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
from rlft.data.images import ImageReader
from rlft.models.kind import class_of
from rlft.models.load import attach_lora, pad_rows
from rlft.models.policy import Policy

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
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
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 1024},
}


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The character tokenizer with the marks of images, and a template that shows them."""
    made = tiny_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *MARKS]})
    made.chat_template = TEMPLATE
    return made


def config_of(kind: str, head: int = 16) -> Any:
    """The config of a model of three layers, whose widths bitsandbytes takes on a CPU. head: size of a head."""
    ids = tokenizer().convert_tokens_to_ids(MARKS)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    text = {
        **{"vocab_size": len(tokenizer()), "hidden_size": 4 * head, "intermediate_size": 64, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head, "max_position_embeddings": 512},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2},
        "rope_parameters": {
            "mrope_section": [head // 8, head * 3 // 16, head * 3 // 16],
            "rope_type": "default",
            "rope_theta": 1e4,
        },
    }
    vision = {
        **{"num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3},
        **VISION[kind],
    }
    vision["hidden_size" if kind == "qwen2_vl" else "out_hidden_size"] = 4 * head
    return AutoConfig.for_model(
        kind, text_config=text, vision_config=vision, tie_word_embeddings=False, **dict(zip(names, ids, strict=True))
    )


def base_of(kind: str, dtype: torch.dtype = torch.float32, head: int = 16) -> Any:
    """A frozen model with random weights, whose embedding and head are padded as those of a loaded one."""
    config = config_of(kind, head)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = class_of(config).from_config(config, attn_implementation="sdpa").to(dtype).eval().requires_grad_(False)
    pad_rows(base.get_input_embeddings().weight, base.get_output_embeddings().weight)
    return base


def save(folder: Path, kind: str = "qwen2_vl", head: int = 16) -> Path:
    """Write a model, its tokenizer and its image processor into a folder; returns it."""
    base_of(kind, head=head).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def reader(kind: str = "qwen2_vl") -> ImageReader:
    """What reads images for a model of `base_of`."""
    return ImageReader(_processor(), config_of(kind).image_token_id, config_of(kind).video_token_id)


@functools.cache
def _processor() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        return AutoImageProcessor.from_pretrained(folder)


def policy_of(
    kind: str, dtype: torch.dtype = torch.float64, trained: float = 0.3, device: str = "cpu", head: int = 16
) -> Policy:
    """A policy over a random model whose adapter is not fresh. trained: size of the noise in the adapter's B."""
    base = base_of(kind, dtype, head).to(device)
    policy = Policy(attach_lora(base, Lora(rank=4, alpha=8), 0), dtype=dtype, images=reader(kind))
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
