"""Move the frozen weights of a decoder's layers off the device: `base.place = "host"` or `"sharded"`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlft.kernels.nf4 import Nf4Weight
from rlft.models.families import Family
from rlft.models.fused.layer_bytes import DividedBytes, HostBytes
from rlft.models.fused.layer_modules import projections_of
from rlft.models.fused.projection import kernel_weight
from rlft.models.fused.ring import LayerBytes, Layout, Ring, frozen_tensors, in_slot, keep

Place = Literal["device", "host", "sharded"]


class Placement:
    """The frozen weights of layers that lie off the device, as the kernels read them from a ring of slots."""

    def __init__(self, layers: Sequence[Sequence[nn.Module]], place: Place, device: torch.device) -> None:
        """Move the weights. layers: the linear modules of each layer. device: the one that computes."""
        self.place = place
        layouts = [Layout.of(_tensors(modules)) for modules in layers]
        source: LayerBytes = {"host": HostBytes, "sharded": DividedBytes}[place](layouts, device)
        for i, modules in enumerate(layers):
            kept = iter(source.put(i, _tensors(modules)))
            for module in modules:
                keep(module, [next(kept) for _ in frozen_tensors(module)])
                _tables_to(module, device)
        source.open()
        self.ring = Ring(layouts, source, device)
        self.elsewhere = sum(layout.bytes for layout in layouts) - source.device_bytes
        """Bytes of the layers that are not in this device's memory."""
        self._weights: dict[nn.Module, Tensor | Nf4Weight] = {}
        for i, modules in enumerate(layers):
            views = iter(self.ring.views(i))
            for module in modules:
                here = [next(views) for _ in frozen_tensors(module)]
                self._weights[module] = in_slot(kernel_weight(module), here)

    @classmethod
    def of(cls, decoder: Any, family: Family, place: Place) -> Placement:
        """Move the weights of a decoder of transformers, whose embeddings lie on the device that computes."""
        layers = [
            [
                getattr(module := layer.get_submodule(name), "base_layer", module)
                for names in projections_of(family.of_layer(decoder.config, index))
                for name in names
            ]
            for index, layer in enumerate(decoder.layers)
        ]
        return cls(layers, place, decoder.get_input_embeddings().weight.device)

    def weight(self, module: nn.Module) -> Tensor | Nf4Weight:
        """Return the weight of a linear module in the slot of its layer."""
        return self._weights[module]


def _tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [tensor for module in modules for tensor in frozen_tensors(module)]


def _tables_to(module: nn.Module, device: torch.device) -> None:
    """Move the small tables of a quantized weight, which are read in place, to the device."""
    state: Any = getattr(module.weight, "quant_state", None)
    if state is not None and state.nested:
        state.offset, state.state2.code = state.offset.to(device), state.state2.code.to(device)


def layer_weights(decoder: Any) -> set[int]:
    """Return the ids of the weights of all linear modules in a decoder's layers, adapters excluded."""
    return {
        id(module.weight)
        for name, module in decoder.layers.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    }


def move_others(model: nn.Module, decoder: Any, device: torch.device) -> None:
    """Move a model to the device that computes, except `layer_weights`."""
    stays = layer_weights(decoder)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in stays:
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
