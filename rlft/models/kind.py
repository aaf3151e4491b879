"""Decide whether a config of transformers is of a causal language model, and how it takes images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlft.errors import ConfigError


@dataclass(frozen=True)
class Seeing:
    """What rlft has to know of a type of model that takes images."""

    tower: tuple[str, ...] = ("model.vision_tower", "model.multi_modal_projector")
    """Modules of the vision tower and its projector."""
    limited: bool = False
    """Whether its image processor resizes to limits of pixels (`data.max_pixels`)."""
    vllm: bool = True
    """Whether vLLM samples prompts with images from the trainer's features (`rlft.rollout.vllm.images`)."""


SEEING = {
    "qwen2_vl": Seeing(("model.visual",), limited=True),
    "qwen2_5_vl": Seeing(("model.visual",), limited=True),
    "qwen3_vl": Seeing(("model.visual",), limited=True),
    "gemma3": Seeing(vllm=False),
    "llava": Seeing(),
    "mistral3": Seeing(),
    "mllama": Seeing(("model.vision_model", "model.multi_modal_projector"), vllm=False),
}
"""Model type -> how its images are taken."""


def seeing_of(config: Any) -> Seeing | None:
    """Return how a model of this config takes images; None for one that does not."""
    return SEEING.get(getattr(config, "model_type", None) or "")


def tower_of(config: Any) -> tuple[str, ...]:
    """Return how names of what is in a model's vision tower and projector begin, up to a dot; () for one of text."""
    seeing = seeing_of(config)
    return () if seeing is None else tuple(f"{name}." for name in seeing.tower)


def sees(config: Any) -> bool:
    """Return whether a model of this config takes images."""
    return seeing_of(config) is not None


def class_of(config: Any) -> Any:
    """Return the automatic class of transformers that loads a model of this config."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM


def check_causal(model: str, config: Any) -> None:
    """Raise ConfigError, with the kind of the model, for one that does not continue text. model: the setting."""
    if sees(config):
        return
    known = _classes(config)
    named = set(config.architectures or known)
    composite = getattr(config, "vision_config", None) is not None
    if getattr(config, "is_encoder_decoder", False):
        known = set()
    if composite and not known:
        raise ConfigError(
            f'model = "{model}": {", ".join(named) or type(config).__name__} is a vision-language model, which is not '
            f"supported yet; give one of {', '.join(SEEING)}, or a model of text alone"
        )
    # BERT and similar models also have a causal class in transformers, but their files were not trained for it.
    fits = bool(known & named) or any(name.endswith("ForCausalLM") for name in named)
    fits = fits or (composite and any(name.endswith("ForConditionalGeneration") for name in named))
    if not (known and fits):
        raise ConfigError(
            f'model = "{model}": {", ".join(config.architectures or [type(config).__name__])} is not a causal language '
            f"model; give one that continues text (transformers' AutoModelForCausalLM)"
        )


def _classes(config: Any) -> set[str]:
    """Return the names of the causal classes of a config."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())  # type: ignore[arg-type]
    return {model_class.__name__ for model_class in (classes if isinstance(classes, tuple) else (classes,))}


def attention_of(config: Any) -> str:
    """Return the attention implementation to load with: "sdpa", or "eager" where sdpa would not be exact.

    That is so for the few classes without sdpa, and for a config with softcapped scores: sdpa ignores the softcap.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        return "eager"
    mapped: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())  # type: ignore[arg-type]
    classes = mapped if isinstance(mapped, tuple) else (mapped,)
    if sees(config):
        return "sdpa"
    return "sdpa" if all(getattr(model_class, "_supports_sdpa", False) for model_class in classes) else "eager"
