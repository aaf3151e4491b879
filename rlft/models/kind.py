"""Whether a config of transformers is of a causal language model, and how to load it: its class, text alone or not."""

from __future__ import annotations

from typing import Any

from rlft.errors import ConfigError

TEXT_PARTS = {
    "mistral3": {r"^(model\.)?language_model\.lm_head": "lm_head", r"^(model\.)?language_model\.(model\.)?": "model."}
}
"""Vision-language models that transformers loads with their vision tower only -> names of files to names of the text
model, which is a causal language model of its own."""


def causal(model: str, config: Any) -> tuple[Any, dict[str, str] | None]:
    """The config to load, and how names in the files become names of the model (None: transformers knows).

    model: the setting. Raises ConfigError for what does not continue text, in words that say what it is.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    known = _classes(config)
    named = set(config.architectures or known)
    composite = getattr(config, "vision_config", None) is not None
    if getattr(config, "is_encoder_decoder", False):
        known = set()
    text = config.get_text_config()
    if composite and not known and config.model_type in TEXT_PARTS and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return text, TEXT_PARTS[config.model_type]
    if composite and not known:
        raise ConfigError(
            f'model = "{model}": {", ".join(named) or type(config).__name__} is a vision-language model, which is not '
            f"supported yet; give a model of text alone"
        )
    # BERT and its like have a causal class of transformers too, and files that were not trained for it.
    fits = bool(known & named) or any(name.endswith("ForCausalLM") for name in named)
    fits = fits or (composite and any(name.endswith("ForConditionalGeneration") for name in named))
    if not (known and fits):
        raise ConfigError(
            f'model = "{model}": {", ".join(config.architectures or [type(config).__name__])} is not a causal language '
            f"model; give one that continues text (transformers' AutoModelForCausalLM)"
        )
    return config, None


def _classes(config: Any) -> set[str]:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())  # type: ignore[arg-type]
    return {made.__name__ for made in (found if isinstance(found, tuple) else (found,))}


def attention_of(config: Any) -> str:
    """transformers' attention to load with: "sdpa", or "eager" for the few classes that have no other."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())  # type: ignore[arg-type]
    classes = found if isinstance(found, tuple) else (found,)
    return "sdpa" if all(getattr(made, "_supports_sdpa", False) for made in classes) else "eager"
