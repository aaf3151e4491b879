"""Everything that reaches into vLLM, through hooks that it offers.

| hook | what rlft does there |
| --- | --- |
| register_model_loader("rlft") | hands over the trainer's weights in place of files |
| register_quantization_config("rlft-shared", "rlft-dequantized") | linear layers that compute from the trainer's
weights, or
  whose memory we fill; embeddings and heads without memory of their own |
| worker_extension_cls | says which model runner runs |
| register_oot("ApplyRotaryEmb") | beside flash-attn-4 only: vLLM's own class, whose start does not end with what
  flash-attn-4 lacks |

Each of them ran on vLLM 0.23 with model runner V2 on a GPU, all but the last on 0.32 with V1 on a CPU, and on nothing
else; `TESTED_ON_GPU` and `TESTED_ON_CPU` say so, and an engine of another version or runner calls itself untested.

vLLM's own LoRA is not used: our linear layers add the adapter themselves (`shared_weights.Slot`), in fixed order and in
two launches, and what they read is ours to write and to read back. Internals that are used: CuMemAllocator's
allocator_and_pools and pointer_to_data, to count and to close; the platform's _global_graph_pool, to close.

Imported only by an engine that starts (rlft.rollout.vllm.engine): importing it imports vLLM and registers the hooks.
"""

# No postponed annotations: torch reads those of the operator.

import itertools
import weakref
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

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

from rlft.errors import EngineError
from rlft.kernels.launch import as_rows
from rlft.kernels.lora_add import lora_add
from rlft.rollout.vllm import shared_weights
from rlft.rollout.vllm.shared_weights import Slot, Weight, WeightCopy, padded, partners

TESTED_ON_GPU = {("0.23", "V2")}
TESTED_ON_CPU = {("0.32", "V1")}
"""vLLM's minor version and its model runner."""


class WeightProvider:
    """One engine's share of the trainer's weights."""

    waiting: "dict[int, WeightProvider]" = {}  # noqa: RUF012 (shared on purpose: vLLM makes the loader, and a config cannot hold tensors)
    """Number in the load config -> the provider of the engine that is starting."""

    def __init__(self, weights: Mapping[str, Weight], ranks: Mapping[str, int], merged: bool) -> None:
        """ranks: of the adapter, by the trainer's modules. merged: into the weights, so that there are no slots."""
        self.weights, self._ranks, self._merged = weights, ranks, merged
        self._slots: list[Slot] = []
        self.weight_copy: WeightCopy | None = None
        """What lies in the engine's own memory; known when vLLM has loaded the model, and written after that."""

    def give(self, model: nn.Module) -> None:
        """Put the weights into vLLM's empty model. Raises EngineError where one has no place or no partner."""
        modules = dict(model.named_modules())
        parameters = dict(model.named_parameters())
        found = partners(parameters, getattr(model, "packed_modules_mapping", {}), self.weights)
        places: dict[str, Tensor] = {}
        scratch, homeless = self._scratch(modules, found), set(self._ranks)
        for name, parameter in parameters.items():
            module = modules[name.rpartition(".")[0]]
            weights = [self.weights[part] for part in found[name]]
            rows = [int(w.shape[0]) for w in weights]
            method = getattr(module, "quant_method", None)
            if isinstance(method, SharedMethod | DequantizedMethod) and name.endswith(".weight"):
                homeless -= {part.removesuffix(".weight") for part in found[name]}
                self._give_slot(module, found[name], rows, parameter)
            if isinstance(method, SharedMethod) and name.endswith(".weight"):
                self._share(module, shared_weights.SharedLinear(weights, scratch))
            elif isinstance(module, LinearBase):
                places |= zip(found[name], parameter.data.split(rows), strict=True)
            else:
                parameter.data = self._whole(name, weights, getattr(module, "rlft_rows", parameter.shape[0]), parameter)
        if homeless:
            raise EngineError(
                f"the adapter has a part at {min(homeless)}, which is no linear layer of vLLM's ({len(homeless)} in "
                f"all): leave it out of lora.targets"
            )
        self.weight_copy = WeightCopy(places, self.weights)

    def _share(self, module: nn.Module, linear: shared_weights.SharedLinear) -> None:
        number = next(SHARED_NUMBERS)
        SHARED[number] = module.rlft_shared = linear  # type: ignore[assignment]
        module.register_buffer("rlft_number", torch.tensor(number, device="cpu"), persistent=False)

    def _give_slot(self, module: nn.Module, names: list[str], rows: list[int], parameter: Tensor) -> None:
        """Room for the adapter, in memory that sleeps."""
        modules = [name.removesuffix(".weight") for name in names]
        ranks = [self._ranks[m] for m in modules if m in self._ranks]
        if ranks and not self._merged:
            columns = int(self.weights[names[0]].shape[1])
            slot = Slot(modules, rows, columns, max(ranks), parameter)
            module.rlft_a = nn.Parameter(slot.a, requires_grad=False)
            module.rlft_b = nn.Parameter(slot.b, requires_grad=False)
            module.rlft_sizes = slot.sizes  # type: ignore[assignment]
            self._slots.append(slot)

    def forget(self) -> None:
        """Refer to nothing of the engine any more."""
        self.weight_copy, self._slots = None, []

    def put(self, adapter: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Write the adapter into its slots. adapter: module -> A [r, in], B [out, r], scaled, in the engine's dtype."""
        shared_weights.put(self._slots, adapter)

    def slots(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(module, A, B) as the kernels read them, with the ranks that are not used."""
        for slot in self._slots:
            yield from slot

    def _scratch(self, modules: dict[str, nn.Module], found: dict[str, list[str]]) -> Tensor | None:
        """Room for the largest shared linear layer, in the memory that sleeps."""
        most = 0
        for name, parts in found.items():
            module, weights = modules[name.rpartition(".")[0]], [self.weights[part] for part in parts]
            shared = isinstance(getattr(module, "quant_method", None), SharedMethod) and name.endswith(".weight")
            if shared and not all(isinstance(w, Tensor) for w in weights):
                most = max(most, sum(w.shape[0] * w.shape[1] for w in weights))
        like = next(iter(modules[""].parameters()))
        return torch.empty(most, dtype=like.dtype, device=like.device) if most else None

    def _whole(self, name: str, weights: list[Weight], rows: int, parameter: nn.Parameter) -> Tensor:
        """The trainer's tensor itself, for an embedding, head or norm."""
        (weight,) = weights if len(weights) == 1 else (None,)
        if not isinstance(weight, Tensor):
            raise EngineError(
                f"{name}: wants one plain weight of the trainer's; this architecture cannot share its weights"
            )
        if weight.dtype != parameter.dtype:
            raise EngineError(
                f"{name}: {weight.dtype} in the trainer and {parameter.dtype} in vLLM; load the model in one dtype"
            )
        view = padded(weight, rows)
        if view is None or (view.shape != parameter.shape and parameter.numel()):
            raise EngineError(
                f"{name}: {tuple(weight.shape)} in the trainer, {tuple(parameter.shape) or rows} in vLLM: this "
                f'architecture cannot share its weights; set engine.name = "eager"'
            )
        return view


@register_model_loader("rlft")
class Loader(BaseModelLoader):
    """Loads nothing: the provider of the engine gives the trainer's weights."""

    def download_model(self, model_config: Any) -> None:
        """Nothing to download."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Called by vLLM with the empty model, before anything is compiled or captured."""
        WeightProvider.waiting[self.load_config.model_loader_extra_config["provider"]].give(model)


SHARED: weakref.WeakValueDictionary[int, shared_weights.SharedLinear] = weakref.WeakValueDictionary()
SHARED_NUMBERS = itertools.count()
"""Shared linear layers by number, which compiled code has as a tensor: what is the same in all layers is compiled once,
and a layer's name would make each different."""


# Both operators are opaque to torch.compile, which must not look at our tables.


@torch.library.custom_op("rlft::shared_linear", mutates_args=())
def shared_linear(x: Tensor, number: Tensor, out: int) -> Tensor:
    """x W^T of the shared linear layer with this number (on the CPU)."""
    return SHARED[int(number)](x)


@shared_linear.register_fake
def _(x: Tensor, number: Tensor, out: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)


@torch.library.custom_op("rlft::add_adapter", mutates_args=("y",))
def add_adapter(y: Tensor, x: Tensor, a: Tensor, b: Tensor, sizes: list[int]) -> None:
    """The adapter's part of a linear layer for x [..., in], added to y [..., out] in place: `lora_add`."""
    lora_add(y.view(-1, y.shape[-1]), as_rows(x), a, b, sizes)


@add_adapter.register_fake
def _(y: Tensor, x: Tensor, a: Tensor, b: Tensor, sizes: list[int]) -> None:
    return None


def with_adapter(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """y [..., out], to which the layer's adapter for x [..., in] is added where it has one."""
    if hasattr(layer, "rlft_a"):
        add_adapter(y, x, layer.rlft_a, layer.rlft_b, layer.rlft_sizes)
    return y


class SharedMethod(LinearMethodBase):
    """A linear layer without memory, computed from the trainer's weights."""

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
        """vLLM asks a layer's weight for its dtype and device, so there is one, of no elements."""
        layer.register_parameter("weight", nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False))
        layer.rlft_out = sum(output_partition_sizes)  # type: ignore[assignment]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing: the weights stay the trainer's."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = with_adapter(layer, x, shared_linear(x, layer.rlft_number, layer.rlft_out))
        return y if bias is None else y + bias


class DequantizedMethod(UnquantizedLinearMethod):
    """A plain linear layer of vLLM in memory that rlft fills, again after each wake."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return with_adapter(layer, x, super().apply(layer, x, bias))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing is repacked: it is filled in place."""


class SharedEmbedding(UnquantizedEmbeddingMethod):
    """Embedding and head over the trainer's tensors."""

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
        """Nothing: on a CPU vLLM would make a packed copy."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits, on a GPU in fp32 as the trainer's: in bf16 one of 30 would be off by up to 0.06."""
        weight: Any = layer.weight
        if not x.is_cuda or x.dtype == torch.float32:
            return functional.linear(x, weight, bias)
        logits = torch.mm(x, weight.T, out_dtype=torch.float32)
        return logits if bias is None else logits + bias


if find_spec("flash_attn") is not None and find_spec("flash_attn.ops") is None:

    @ApplyRotaryEmb.register_oot
    class Rotary(ApplyRotaryEmb):
        """vLLM's own, beside flash-attn-4. 0.23 takes any package flash_attn for flash-attn 2, imports a function of it
        last of all, for AMD's cards, and would not start."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            try:
                super().__init__(*args, **kwargs)
            except ModuleNotFoundError as error:
                if not str(error.name).startswith("flash_attn"):
                    raise


class _WeightConfig(QuantizationConfig):
    """Which of our methods a layer gets."""

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
    """Linear layers computed from the trainer's bytes."""

    shared = True


@register_quantization_config("rlft-dequantized")
class DequantizedConfig(_WeightConfig):
    """Linear layers in memory of vLLM's, filled from the trainer's bytes."""

    shared = False


def frees_itself() -> bool:
    """Whether this version of vLLM gives the memory of an engine back in its shutdown; 0.23 does not."""
    return hasattr(CuMemAllocator, "release_pools")


def release_pools(asleep: bool) -> None:
    """Give back the memory of an engine that has been shut down, so that the process can start another one. asleep: it
    slept, so that nothing of it is mapped.

    Later versions of vLLM do most of this in their shutdown. In 0.23 much of the model is still referred to then (by
    vLLM's hook in torch._dynamo and what that keeps), and vLLM has one allocator per process, which takes a new engine
    only when it holds nothing. So the old one sleeps for good: its memory is unmapped, and its tensors, which nothing
    runs on, keep their addresses. The pools are kept, since PyTorch would hand the allocator segments that it knows no
    more.
    """
    # The pool of its graphs is gone with the last of them, and the next engine would capture into it.
    type(current_platform)._global_graph_pool = None
    if frees_itself():
        return
    allocator = CuMemAllocator.get_instance()
    if not asleep:
        torch.cuda.synchronize()
        allocator.sleep(())
    allocator.pointer_to_data.clear()
    for tag in [tag for tag in allocator.allocator_and_pools if not tag.startswith("closed")]:
        kept = allocator.allocator_and_pools.pop(tag)
        allocator.allocator_and_pools[f"closed {id(kept)}"] = kept


def unmapped() -> int:
    """Bytes that PyTorch counts as reserved and unused and that no memory is behind: what vLLM's pools gave back."""
    if frees_itself():
        return 0
    allocator = CuMemAllocator.get_instance()
    segments = [segment for pool, _ in allocator.allocator_and_pools.values() for segment in pool.snapshot()]
    gone = [s for s in segments if s["address"] not in allocator.pointer_to_data]
    return sum(s["total_size"] - s["allocated_size"] for s in gone)


class WorkerExtension:
    """What vLLM's worker gets, called through `LLM.collective_rpc`."""

    def rlft_long_rope(self) -> list[bool]:
        """Whether the model's rotary modules with longrope take the long factors; empty where they do not say it."""
        found = {getattr(m, "use_long_rope", None) for m in self.get_model().modules()}  # type: ignore[attr-defined]
        return sorted(bool(long) for long in found - {None})

    def rlft_runner(self) -> str:
        """ "V1" or "V2": the model runner that runs."""
        return "V2" if getattr(self, "use_v2_model_runner", False) else "V1"
