"""Everything that depends on vLLM's internals, through extension points that vLLM offers.

| extension point | use in rlft |
| --- | --- |
| register_model_loader("rlft") | gives the trainer's weights to vLLM instead of files |
| register_quantization_config("rlft-shared", "rlft-dequantized") | linear layers that compute from the
  trainer's weights, or whose memory we fill; embeddings and heads without separate memory |
| worker_extension_cls | returns which model runner is active |
| register_oot("ApplyRotaryEmb") | only with flash-attn-4: vLLM's own class, without the import that fails there |

All of them were tested on vLLM 0.23 with model runner V2 on a GPU, and all but the last on 0.32 with V1 on a CPU
(`TESTED_ON_GPU`, `TESTED_ON_CPU`). An engine of another version or runner reports itself as untested.

vLLM's own LoRA is not used: our linear layers add the adapter themselves (`shared_weights.Slot`), in fixed order and in
two launches, and rlft writes and reads back the memory they use. Private attributes in use: allocator_and_pools and
pointer_to_data of CuMemAllocator, to count and free memory; _global_graph_pool of the platform, at close.

Imported only when an engine starts (rlft.rollout.vllm.engine), since it imports vLLM and registers the hooks.

Legend: x activations [..., in], y outputs [..., out], W a weight, a and b the adapter's A [r, in] and B [out, r].
"""

# No postponed annotations here, because torch reads those of the custom operators at run time.

import itertools
import weakref
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.device_allocator.cumem import CuMemAllocator
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform

from rlft.errors import UnsupportedModel
from rlft.kernels.launch import as_rows
from rlft.kernels.lora_add import lora_add
from rlft.rollout.vllm import shared_weights
from rlft.rollout.vllm.names import Naming, Weight, partners
from rlft.rollout.vllm.shared_weights import Slot, WeightCopy

TESTED_ON_GPU = {("0.23", "V2")}
TESTED_ON_CPU = {("0.32", "V1")}
"""Tested pairs of vLLM's minor version and model runner."""


class WeightProvider:
    """Give the trainer's weights and adapter to one engine."""

    waiting: "dict[int, WeightProvider]" = {}  # noqa: RUF012 (shared on purpose: vLLM makes the loader, and a config cannot hold tensors)
    """Number in the load config -> provider of an engine that is starting."""

    def __init__(self, weights: Mapping[str, Weight], ranks: Mapping[str, int], merged: bool) -> None:
        """Hold the weights.

        ranks: of the adapter, by the trainer's modules. merged: merge it, so that no slots exist.
        """
        self.weights, self._ranks, self._merged = weights, ranks, merged
        self._slots: list[Slot] = []
        self.stage: Literal["configured", "building", "built"] = "configured"
        """How far vLLM is with its model."""
        self.weight_copy: WeightCopy | None = None
        """Copy of weights to the engine's own memory; set once vLLM has loaded the model, and run after that."""
        self.zeros: list[Tensor] = []
        """What is 0 between vLLM's passes and loses its content in sleep: features behind Qwen3-VL's first layers."""

    def give(self, model: nn.Module) -> None:
        """Put the weights into vLLM's empty model. Raises UnsupportedModel for a weight without a counterpart."""
        modules = dict(model.named_modules())
        naming = Naming.of(model)
        ours = {naming.rename(name) for name in self.weights}
        # vLLM has buffers besides that the trainer has not, such as the scales of a quantized cache.
        buffers = {name: buffer for name, buffer in shared_weights.saved_buffers(model).items() if name in ours}
        parameters = dict(model.named_parameters()) | buffers
        matches = partners(parameters, naming, self.weights)
        places: dict[str, Tensor] = {}
        scratch, unplaced = self._scratch(modules, matches), set(self._ranks)
        for name, parameter in parameters.items():
            module, parts = modules[name.rpartition(".")[0]], matches[name]
            weights = [self.weights[part] for part in parts]
            method = getattr(module, "quant_method", None)
            is_linear = isinstance(method, SharedMethod | DequantizedMethod)
            if is_linear and name.endswith(".weight"):
                unplaced -= {part.removesuffix(".weight") for part in parts}
                self._give_slot(module, parts, parameter)
            if isinstance(method, SharedMethod) and name.endswith(".weight"):
                shared_weights.check_shapes(name, weights, module.rlft_shape)  # type: ignore[arg-type]
                self._share(module, shared_weights.SharedLinear(weights, scratch))
            elif is_linear or shared_weights.needs_copy(weights, parameter):
                places |= shared_weights.places_of(name, parts, weights, parameter.data)
            else:
                parameter.data = shared_weights.shared_tensor(name, weights[0], parameter, module)
        if unplaced:
            raise UnsupportedModel(
                f"the adapter has a part at {min(unplaced)}, which is no linear layer of vLLM's ({len(unplaced)} in "
                f"all): leave it out of lora.targets for vLLM"
            )
        self.weight_copy = WeightCopy(places, self.weights)
        self.zeros = list(getattr(model, "deepstack_input_embeds", ()))  # type: ignore[arg-type]

    def _share(self, module: nn.Module, linear: shared_weights.SharedLinear) -> None:
        number = next(SHARED_NUMBERS)
        SHARED[number] = module.rlft_shared = linear  # type: ignore[assignment]
        module.register_buffer("rlft_number", torch.tensor(number, device="cpu"), persistent=False)

    def _give_slot(self, module: nn.Module, names: list[str], parameter: Tensor) -> None:
        """Allocate the adapter's slot, in memory that is freed during sleep."""
        modules = [name.removesuffix(".weight") for name in names]
        ranks = [self._ranks[name] for name in modules if name in self._ranks]
        if ranks and not self._merged:
            rows, columns = [int(self.weights[name].shape[0]) for name in names], int(self.weights[names[0]].shape[1])
            slot = Slot(modules, rows, columns, max(ranks), parameter)
            module.rlft_a = nn.Parameter(slot.a, requires_grad=False)
            module.rlft_b = nn.Parameter(slot.b, requires_grad=False)
            module.rlft_sizes = slot.sizes  # type: ignore[assignment]
            self._slots.append(slot)

    def forget(self) -> None:
        """Drop all references to the engine's memory."""
        self.weight_copy, self._slots, self.zeros = None, [], []

    def put(self, adapter: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Write the adapter into its slots.

        adapter: module -> (A [r, in], B [out, r]), scaled, in the engine's dtype.
        """
        shared_weights.put(self._slots, adapter)

    def slots(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (module, A, B) as the kernels read them, including unused ranks."""
        for slot in self._slots:
            yield from slot

    def _scratch(self, modules: dict[str, nn.Module], matches: dict[str, list[str]]) -> Tensor | None:
        """Allocate a buffer for the largest shared linear layer, in memory that is freed during sleep."""
        size = 0
        for name, parts in matches.items():
            module, weights = modules[name.rpartition(".")[0]], [self.weights[part] for part in parts]
            is_shared = isinstance(getattr(module, "quant_method", None), SharedMethod) and name.endswith(".weight")
            if is_shared and not all(isinstance(weight, Tensor) for weight in weights):
                size = max(size, sum(weight.shape[0] * weight.shape[1] for weight in weights))
        like = next(iter(modules[""].parameters()))
        return torch.empty(size, dtype=like.dtype, device=like.device) if size else None


@register_model_loader("rlft")
class Loader(BaseModelLoader):
    """Load no files: the engine's WeightProvider gives the trainer's weights."""

    def download_model(self, model_config: Any) -> None:
        """Do nothing."""

    @property
    def _provider(self) -> WeightProvider:
        return WeightProvider.waiting[self.load_config.model_loader_extra_config["provider"]]

    def load_model(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Note that vLLM builds its model, whose failure is another matter than one of memory or settings."""
        self._provider.stage = "building"
        return super().load_model(*args, **kwargs)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Give the weights to the empty model. Called by vLLM before anything is compiled or captured."""
        self._provider.stage = "built"
        self._provider.give(model)


SHARED: weakref.WeakValueDictionary[int, shared_weights.SharedLinear] = weakref.WeakValueDictionary()
SHARED_NUMBERS = itertools.count()
"""Shared linear layers by number. Compiled code has the number as a tensor, so that equal layers are compiled once; a
layer's name would make each of them different."""


# Both operators are opaque to torch.compile, which must not trace our tables.


@torch.library.custom_op("rlft::shared_linear", mutates_args=())
def shared_linear(x: Tensor, number: Tensor, out: int) -> Tensor:
    """Compute x W^T of the shared linear layer with this number (a CPU tensor)."""
    return SHARED[int(number)](x)


@shared_linear.register_fake
def _(x: Tensor, number: Tensor, out: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)


@torch.library.custom_op("rlft::add_adapter", mutates_args=("y",))
def add_adapter(y: Tensor, x: Tensor, a: Tensor, b: Tensor, sizes: list[int]) -> None:
    """Add the adapter's output for x [..., in] to y [..., out] in place, with `lora_add`."""
    lora_add(y.view(-1, y.shape[-1]), as_rows(x), a, b, sizes)


@add_adapter.register_fake
def _(y: Tensor, x: Tensor, a: Tensor, b: Tensor, sizes: list[int]) -> None:
    return None


def with_adapter(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Add the output of the layer's adapter, if any, for x [..., in] to y [..., out]."""
    if hasattr(layer, "rlft_a"):
        add_adapter(y, x, layer.rlft_a, layer.rlft_b, layer.rlft_sizes)
    return y


class SharedMethod(LinearMethodBase):
    """A linear layer without memory that computes from the trainer's weights."""

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register an empty weight, since vLLM reads dtype and device from it."""
        layer.register_parameter("weight", nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False))
        layer.rlft_shape = (sum(output_partition_sizes), input_size_per_partition)  # type: ignore[assignment]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Do nothing: the weights stay the trainer's."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        shape: Any = layer.rlft_shape
        y = with_adapter(layer, x, shared_linear(x, layer.rlft_number, shape[0]))
        return y if bias is None else y + bias


class DequantizedMethod(UnquantizedLinearMethod):
    """A plain linear layer of vLLM in memory that rlft fills, again after each wake."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return with_adapter(layer, x, super().apply(layer, x, bias))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Do nothing: vLLM must not repack memory that is filled in place."""


class SharedEmbedding(UnquantizedEmbeddingMethod):
    """Embedding and head that use the trainer's tensors."""

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        layer.register_parameter("weight", nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False))
        layer.rlft_rows = sum(output_partition_sizes)  # type: ignore[assignment]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Do nothing: on a CPU vLLM would make a packed copy."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute logits, on a GPU in fp32 as in the trainer: in bf16 a logit of 30 is off by up to 0.06."""
        weight: Any = layer.weight
        if not x.is_cuda or x.dtype == torch.float32:
            return functional.linear(x, weight, bias)
        logits = torch.mm(x, weight.T, out_dtype=torch.float32)
        return logits if bias is None else logits + bias


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
    def from_config(cls, config: dict[str, Any]) -> "_WeightConfig":
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, LinearBase):
            return SharedMethod() if self.shared else DequantizedMethod()
        return SharedEmbedding() if isinstance(layer, VocabParallelEmbedding) else None


@register_quantization_config("rlft-shared")
class SharedConfig(_WeightConfig):
    """Linear layers that compute from the trainer's weights."""

    shared = True


@register_quantization_config("rlft-dequantized")
class DequantizedConfig(_WeightConfig):
    """Linear layers in vLLM's memory, filled from the trainer's weights."""

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


class WorkerExtension:
    """Methods added to vLLM's worker, called through `LLM.collective_rpc`."""

    def rlft_long_rope(self) -> list[bool]:
        """Return the distinct values of use_long_rope over the rotary modules; empty where none has it."""
        values = {getattr(module, "use_long_rope", None) for module in self.get_model().modules()}  # type: ignore[attr-defined]
        return sorted(bool(long) for long in values - {None})

    def rlft_runner(self) -> str:
        """Return the active model runner, "V1" or "V2"."""
        return "V2" if getattr(self, "use_v2_model_runner", False) else "V1"
