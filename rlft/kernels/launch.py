"""Shared code of the kernel files: launch on the device of the tensors, and checks of arguments.

Only the device decides: CUDA tensors use the Triton kernel, CPU tensors the PyTorch reference. With TRITON_INTERPRET=1
(set before triton is imported) the tests call the launchers on CPU tensors. n: a positive number; m: the index of a row
of a table.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING or importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    def jit(function: Callable[..., Any]) -> Any:
        """Compile a function that kernels call; `kernel` is for those that are launched."""
        return triton.jit(function)
else:
    triton: Any = None
    tl: Any = None

    def jit(function: Callable[..., Any]) -> Any:
        """Return the function itself: without Triton (macOS, Windows) nothing launches it."""
        return function


class Kernel:
    """A Triton function that `launch` runs, with its compiled variants.

    varying: names of arguments that change with the number of tokens and on which no load depends for its vector width.
    Triton compiles a variant for integers that are 1 and one for multiples of 16, except for these: otherwise the first
    micro-batch with a multiple of 16 tokens would wait seconds for all kernels.
    """

    def __init__(self, function: Callable[..., Any], varying: tuple[str, ...]) -> None:
        names = list(inspect.signature(function).parameters)
        self.varying = tuple(names.index(name) for name in varying)
        self.function: Any = triton.jit(do_not_specialize=list(varying))(function) if triton else function
        self.interpreted = not (triton and isinstance(self.function, triton.JITFunction))
        self.variants: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
        """Kind of call -> compiled kernel, and the values of the keyword arguments."""


def kernel(*, varying: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Kernel]:
    """Make a function a `Kernel`; see there for `varying`."""
    return lambda function: Kernel(function, varying)


KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the elementwise kernels read and write; they compute in float32."""


def on_gpu(op: str, **tensors: Tensor | None) -> bool:
    """Return True if all tensors are on one CUDA device, False if all are on the CPU.

    op: name of the public function, for the error. Raises ValueError with the devices if they differ.
    """
    first = None
    for tensor in tensors.values():
        if tensor is None:
            continue
        first = tensor.device if first is None else first
        if tensor.device != first:
            devices = {name: value.device for name, value in tensors.items() if value is not None}
            raise ValueError(
                f"{op}: all tensors must be on one device, got "
                f"{', '.join(f'{name} on {device}' for name, device in devices.items())}"
            )
    assert first is not None
    return first.type == "cuda"


@cache
def element_type(dtype: torch.dtype) -> Any:
    """Return Triton's name of a floating-point dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))


@jit
def table_entry(table, pid, COUNT: tl.constexpr, FIELDS: tl.constexpr):
    """Return m, the row of a table that program `pid` works on, and the program's index within it.

    The table has COUNT rows of FIELDS int64; the last field of a row is its first program.
    """
    m = 0
    for i in tl.static_range(1, COUNT):  # type: ignore[reportGeneralTypeIssues]
        m += (pid >= tl.load(table + i * FIELDS + FIELDS - 1).to(tl.int32)).to(tl.int32)
    return m, pid - tl.load(table + m * FIELDS + FIELDS - 1).to(tl.int32)


_HERE = nullcontext()


@cache
def _devices() -> int:
    """Return the number of CUDA devices."""
    return torch.cuda.device_count()


def _on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context with the device of `tensor` as the current one, on which Triton launches.

    With one device nothing is queried, since this runs dozens of times per layer.
    """
    if not tensor.is_cuda or _devices() == 1 or tensor.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


ALIGNMENT = 64
"""In bytes. Triton recompiles for addresses that are not multiples of 16; this is finer, to be safe."""
PLAIN = {float, bool, str, type(None)}
"""Types of arguments that are neither tensors nor integers."""


def launch(kernel: Kernel, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first argument, a tensor, and the current stream.

    arguments: in the kernel's order. constants: its remaining parameters, num_warps and the like.

    Triton inspects every argument and constant to find the compiled kernel, 33 times per layer, which made passes wait
    for the host (benchmarks/host_time.py). Here a call of a known kind starts its compiled kernel directly, as in
    Triton's tutorial on fused softmax. The kind is at least as fine as Triton's specialization, so that its rules need
    not be repeated: device, all types, each tensor's dtype and address modulo 64, and all numbers except those of
    `kernel.varying`, on which Triton does not specialize.
    """
    with _on_device(arguments[0]):
        if kernel.interpreted:
            kernel.function[grid](*arguments, **constants)
            return
        # Only integers stand for themselves; other values need their type, since 1, 1.0 and True are equal.
        kind = [
            argument
            if (argument_type := argument.__class__) is int
            else (argument_type, argument)
            if argument_type in PLAIN
            else (argument.dtype, argument.data_ptr() % ALIGNMENT)
            for argument in arguments
        ]
        for i in kernel.varying:
            kind[i] = arguments[i] >> 31
        key = (arguments[0].get_device(), *kind, *constants.items(), *map(type, constants.values()))
        variant = kernel.variants.get(key)
        if variant is None:
            compiled = kernel.function[grid](*arguments, **constants)
            values = tuple(constants[name] for name in kernel.function.arg_names[len(arguments) :])
            kernel.variants[key] = (compiled, values)
        else:
            compiled, values = variant
            compiled[(*grid, 1, 1)[:3]](*arguments, *values)


def check_args(op: str, ok: bool, wanted: str, **got: Tensor | None) -> None:
    """Raise ValueError with what `op` expects and the shapes, dtypes and strides it got, unless `ok`."""
    if not ok:
        shown = ", ".join(
            f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} strides {tensor.stride()}"
            for name, tensor in got.items()
            if tensor is not None
        )
        raise ValueError(f"{op}: want {wanted}; got {shown}")


def as_rows(tensor: Tensor) -> Tensor:
    """View [..., H] as [T, H] with adjacent columns; copy only if its strides require it."""
    rows = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]
    return rows if rows.stride(1) == 1 else rows.contiguous()


def power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
