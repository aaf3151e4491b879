"""vLLM's linear layers, embeddings and heads that compute from the trainer's weights, or from memory that we fill.

vLLM's own LoRA is not used: the layers add the adapter themselves (`slots.Slot`), in fixed order and in two launches,
and rlft writes and reads back the memory they use.

Imported only when an engine starts, since it imports vLLM.

Legend: x activations [..., in], y outputs [..., out], a and b the adapter's A [r, in] and B [out, r].
"""

# No postponed annotations here, because torch reads those of the custom operators at run time.

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from rlft.kernels.launch import as_rows
from rlft.kernels.lora_add import lora_add
from rlft.rollout.vllm import shared_weights

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
