"""Hand images to vLLM as the features of the trainer's vision tower; vLLM has no tower.

| extension point | use in rlft |
| --- | --- |
| ModelRegistry.register_model | vLLM's own vision-language model, without its tower |
| MULTIMODAL_REGISTRY.register_processor | how many tokens an image can have, in place of a processor of pixels |
| mm_input | a prompt with the ids that rlft expanded, the features, and the rows that they are for |

vLLM and the trainer then compute from the same features, bit for bit, and the tower runs once per image and step. With
pixels, vLLM would expand the ids by a processor and run a tower, which round otherwise.

Imported only when an engine starts over such a model, as `rlft.rollout.vllm.hooks` is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm import ModelRegistry
from vllm.inputs.engine import mm_input
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.processing import BaseProcessingInfo

from rlft.data.image_readers import GridReader, ImageReader
from rlft.errors import UnsupportedModel
from rlft.models.vision import Features
from rlft.positions import feature_places
from rlft.rollout.vllm.start import seeing, version
from rlft.types import Image, Prompt

FEATURES, GRID = "image_embeds", "image_grid_thw"
"""Names under which vLLM's models read features, and the patches in time, rows and columns for M-RoPE."""
FIELDS = {
    FEATURES: MultiModalFieldConfig.batched("image"),
    GRID: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
}


class Limits(BaseProcessingInfo):
    """What vLLM plans its cache of features by."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """An image of the longest prompt. seq_len: tokens of the longest sequence."""
        return dict.fromkeys(mm_counts, seq_len)


class Processor:
    """Holds the limits for vLLM. It processes nothing: prompts come with their features."""

    def __init__(self, info: Limits, dummy_inputs: Any, **_: Any) -> None:
        self.info = info
        self.cache = None  # which vLLM 0.23 empties when it goes to sleep


def register(architecture: str) -> None:
    """Let vLLM build a model of this class of transformers without its tower, under the name `start.seeing`.

    Raises UnsupportedModel where vLLM has no such model, or cannot import it.
    """
    name = seeing(architecture)
    if name in ModelRegistry.models:
        return
    known: Any = ModelRegistry.models.get(architecture)
    if known is None:
        raise UnsupportedModel(f"vLLM {version()} has no model {architecture}")
    try:
        model = known.load_model_cls()
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit PyTorch
        raise UnsupportedModel(f"vLLM {version()} cannot import its {architecture} ({error})") from error
    registered = MULTIMODAL_REGISTRY.register_processor(
        Processor,  # type: ignore[arg-type]
        info=Limits,
        dummy_inputs=lambda info: None,  # type: ignore[arg-type,return-value]
    )(without_tower(model))
    ModelRegistry.register_model(name, registered)


def without_tower(model: Any) -> Any:
    """Return a class of vLLM's model that takes features for images. model: its vision-language class."""

    class Seeing(model):
        """vLLM's model, whose tower is left out since the number of images to encode is limited to 0."""

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            levels = getattr(self.config.vision_config, "deepstack_visual_indexes", ())
            if levels:
                self._give_levels(len(levels), vllm_config.scheduler_config.max_num_batched_tokens)

        def _give_levels(self, levels: int, tokens: int) -> None:
            """Set what Qwen3-VL has for features behind its first layers, which vLLM leaves out with the tower."""
            hidden = self.config.text_config.hidden_size
            self.use_deepstack, self.deepstack_num_level = True, levels
            self.multiscale_dim = levels * self.visual_dim
            self.deepstack_input_embeds = [torch.zeros(tokens, hidden) for _ in range(levels)]
            self.deepstack_input_embeds_num_tokens = 0

        def embed_multimodal(self, **given: Any) -> list[torch.Tensor]:
            """Return the features of each image, [tokens, H] or, with those behind layers, [tokens, (1 + L) * H]."""
            return list(given[FEATURES])

    Seeing.__name__ = Seeing.__qualname__ = seeing(model.__name__)
    return Seeing


def request(prompt: Prompt, features: Sequence[Features], reader: ImageReader) -> Any:
    """Return vLLM's input of a prompt with images. features: of each of its images."""
    images = prompt.images
    held = {FEATURES: [torch.cat([each.rows, *each.deep], dim=-1) for each in features]}
    if isinstance(reader, GridReader):
        held[GRID] = [torch.tensor(reader.grid(image)) for image in images]
    return mm_input(
        list(prompt.ids),
        MultiModalKwargsItems.from_hf_inputs(held, {name: FIELDS[name] for name in held}),  # type: ignore[arg-type]
        {"image": [_name(image) for image in images]},
        {"image": [_place(image) for image in images]},
    )


def _place(image: Image) -> PlaceholderRange:
    """Return where the features of an image are in its prompt."""
    filled = torch.zeros(image.tokens, dtype=torch.bool)
    filled[torch.from_numpy(feature_places(image))] = True
    return PlaceholderRange(image.start, image.tokens, None if filled.all() else filled)


def _name(image: Image) -> str:
    """Return the key of an image in vLLM's caches: two sizes of one file are two images."""
    return f"{image.digest}-{image.height}x{image.width}"
