"""Replace a decoder's forward by fused layers, where they can run it."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from rlft.errors import ConfigError
from rlft.models import families, kv_cache
from rlft.models.device_memory import DeviceMemory
from rlft.models.fusable import config_problem
from rlft.models.fused.decoder import FusedDecoder
from rlft.models.fused.placement import Place, Placement


def fuse(model: PeftModel, device_memory: DeviceMemory | None = None, place: Place = "device") -> FusedDecoder | str:
    """Run the decoder of `model` by fused layers from now on, or return why its own layers stay.

    device_memory: as of `FusedDecoder`. place: where the frozen weights of the layers are moved to. Raises ConfigError
    for a model whose weights were moved elsewhere before.
    """
    base: Any = model.get_base_model()
    decoder = base.get_decoder()
    existing = getattr(vars(decoder).get("forward"), "__self__", None)
    if isinstance(existing, FusedDecoder):
        before = existing.placement.place if existing.placement is not None else "device"
        if place != before:
            raise ConfigError(
                f'base.place = "{place}": the model object has been used with base.place = "{before}", and its weights '
                f"stay there; load it again"
            )
        existing.model = model
        existing.device_memory = device_memory or existing.device_memory
        return existing.problem() or existing
    family = families.find(decoder.config.model_type)
    if family is None:
        return f'no fused layer for the architecture "{decoder.config.model_type}"'
    known = type(decoder).__name__ == family.decoder and type(decoder).__module__.startswith("transformers.models.")
    if not known or not kv_cache.name(decoder):
        return f"{type(decoder).__module__}.{type(decoder).__name__} is not transformers' {family.decoder}"
    problem = config_problem(decoder.config, family)
    if problem is not None:
        return problem
    if family.experts is not None and place != "device":
        return f'the experts of "{decoder.config.model_type}" are read from the device alone'
    try:
        placement = Placement.of(decoder, family, place) if place != "device" else None
        fused = FusedDecoder(model, decoder, family, device_memory, placement)
    except ValueError as error:
        return str(error)
    problem = fused.problem()
    if problem is not None:
        return problem
    decoder.forward = fused.forward
    return fused
