"""The extension points of vLLM that rlft uses.

| extension point | use in rlft |
| --- | --- |
| register_model_loader("rlft") | gives the trainer's weights to vLLM instead of files |
| register_quantization_config("rlft-shared", "rlft-dequantized") | linear layers and experts that compute from the
  trainer's weights, or whose memory we fill; embeddings and heads without separate memory |
| worker_cls | says which model runner is active, and logs the experts of each token (`rlft.rollout.vllm.worker`) |
| register_oot("ApplyRotaryEmb") | only with flash-attn-4: vLLM's own class, without the import that fails there |

All but worker_cls were tested on vLLM 0.23 with model runner V2 on a GPU, and all but the last on 0.32 with V1 on a CPU
(`TESTED_ON_GPU`, `TESTED_ON_CPU`). An engine of another version or runner reports itself as untested.

Private attributes in use: allocator_and_pools and pointer_to_data of CuMemAllocator, to count and free memory;
_global_graph_pool of the platform, at close; input_batch or execute_model_state of the model runner. What depends on
vLLM's internals is in this file, in `rlft.rollout.vllm.linear`, `rlft.rollout.vllm.experts`,
`rlft.rollout.vllm.provider` and `rlft.rollout.vllm.worker`.

Imported only when an engine starts (rlft.rollout.vllm.engine), since it imports vLLM and registers the hooks.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.device_allocator.cumem import CuMemAllocator
from vllm.model_executor.layers.fused_moe import GateLinear, RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, ReplicatedLinear
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform

from rlft.rollout.vllm.experts import RouterMethod, method_of
from rlft.rollout.vllm.linear import DequantizedMethod, SharedEmbedding, SharedMethod
from rlft.rollout.vllm.provider import WeightProvider

TESTED_ON_GPU = {("0.23", "V2")}
TESTED_ON_CPU = {("0.32", "V1")}
"""Tested pairs of vLLM's minor version and model runner."""


@register_model_loader("rlft")
class Loader(BaseModelLoader):
    """Load no files: the engine's WeightProvider gives the trainer's weights."""

    def download_model(self, model_config: Any) -> None:
        """Do nothing."""

    @property
    def _provider(self) -> WeightProvider:
        return _provider_of(self.load_config)

    def load_model(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Note that vLLM builds its model, whose failure is another matter than one of memory or settings."""
        self._provider.stage = "building"
        return super().load_model(*args, **kwargs)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Give the weights to the empty model. Called by vLLM before anything is compiled or captured."""
        self._provider.stage = "built"
        self._provider.give(model)


def _provider_of(load_config: Any) -> WeightProvider:
    """Return the provider of the engine that vLLM is building."""
    return WeightProvider.waiting[load_config.model_loader_extra_config["provider"]]


if find_spec("flash_attn") is not None and find_spec("flash_attn.ops") is None:

    @ApplyRotaryEmb.register_oot
    class Rotary(ApplyRotaryEmb):
        """vLLM's own class, usable with flash-attn-4.

        vLLM 0.23 assumes that any package flash_attn is flash-attn 2 and imports an AMD function from it at the end of
        `__init__`, which fails with flash-attn-4.
        """

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            try:
                super().__init__(*args, **kwargs)
            except ModuleNotFoundError as error:
                if not str(error.name).startswith("flash_attn"):
                    raise


class _WeightConfig(QuantizationConfig):
    """Choose the method of rlft for each layer."""

    shared: bool

    @classmethod
    def get_name(cls) -> Any:
        return "rlft-shared" if cls.shared else "rlft-dequantized"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> _WeightConfig:
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if _is_router(layer, prefix):
            return RouterMethod()
        if isinstance(layer, LinearBase):
            return SharedMethod() if self.shared else DequantizedMethod()
        if isinstance(layer, RoutedExperts):
            provider = _provider_of(get_current_vllm_config().load_config)
            return method_of(layer, self.shared, provider.adapts_experts, provider.gate)
        return SharedEmbedding() if isinstance(layer, VocabParallelEmbedding) else None


def _is_router(layer: nn.Module, prefix: str) -> bool:
    """Return whether a layer of vLLM's is a router of experts; 0.23 has no class for those of most models."""
    return isinstance(layer, GateLinear) or (
        isinstance(layer, ReplicatedLinear) and prefix.endswith((".gate", ".router"))
    )


@register_quantization_config("rlft-shared")
class SharedConfig(_WeightConfig):
    """Linear layers and experts that compute from the trainer's weights."""

    shared = True


@register_quantization_config("rlft-dequantized")
class DequantizedConfig(_WeightConfig):
    """Linear layers and experts in vLLM's memory, filled from the trainer's weights."""

    shared = False


def frees_itself() -> bool:
    """Return whether this version of vLLM frees an engine's memory in its shutdown; 0.23 does not."""
    return hasattr(CuMemAllocator, "release_pools")


def release_pools(asleep: bool) -> None:
    """Free the memory of an engine that has been shut down, so that the process can start another one.

    asleep: the engine was asleep, so none of its memory is mapped.

    Later versions of vLLM do most of this in their shutdown. In 0.23 much of the model is still referenced then (by
    vLLM's hook in torch._dynamo), and vLLM has one allocator per process, which accepts a new engine only when it is
    empty. The old engine is therefore put to sleep for good: its memory is unmapped, and its unused tensors keep their
    addresses. The pools must stay alive, since otherwise PyTorch would return segments that the allocator has
    forgotten.
    """
    # The CUDA graph pool is destroyed with the last graph, and the next engine must not capture into it.
    type(current_platform)._global_graph_pool = None
    if frees_itself():
        return
    allocator = CuMemAllocator.get_instance()
    if not asleep:
        torch.cuda.synchronize()
        allocator.sleep(())
    allocator.pointer_to_data.clear()
    for tag in [tag for tag in allocator.allocator_and_pools if not tag.startswith("closed")]:
        pool = allocator.allocator_and_pools.pop(tag)
        allocator.allocator_and_pools[f"closed {id(pool)}"] = pool


def unmapped() -> int:
    """Return the bytes that PyTorch counts as reserved but vLLM's pools have unmapped."""
    if frees_itself():
        return 0
    allocator = CuMemAllocator.get_instance()
    segments = [segment for pool, _ in allocator.allocator_and_pools.values() for segment in pool.snapshot()]
    missing = [segment for segment in segments if segment["address"] not in allocator.pointer_to_data]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in missing)
