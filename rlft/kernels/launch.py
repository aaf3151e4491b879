"""What every kernel file needs around its launches: which path the tensors take, and its checks at the public edge.

The device decides and nothing else: CUDA tensors take the Triton kernel, CPU tensors the PyTorch reference. With
TRITON_INTERPRET=1 (set before triton is imported) the tests call the launchers themselves on CPU tensors.
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

VARYING = ("T", "N", "T_share", "SPLITS", "head_1", "head_2")
"""Arguments of kernels that change with the number of tokens, and stand where no load is made wider for them."""

if TYPE_CHECKING or importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    def jit(function: Callable[..., Any]) -> Any:
        """triton.jit; the function itself where there is no Triton (macOS, Windows), whose tensors are on the CPU.

        Triton compiles a kernel anew for integers that are 1 or multiples of 16, unless told not to: a run's first
        micro-batch of a multiple of 16 tokens would wait seconds for all kernels.
        """
        parameters = inspect.signature(function).parameters.values()
        varying = [p.name for p in parameters if p.name in VARYING and p.annotation is p.empty]
        return triton.jit(do_not_specialize=varying)(function)
else:
    tl: Any = None

    def jit(function: Callable[..., Any]) -> Any:
        """The function itself: nothing launches it here."""
        return function


KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the elementwise kernels read and write; inside they compute in float32."""


def on_gpu(op: str, **tensors: Tensor | None) -> bool:
    """True when all tensors are on one CUDA device, False when all are on the CPU.

    op: name of the public function, for the error. Raises ValueError naming the devices when they are mixed.
    """
    first = None
    for tensor in tensors.values():
        if tensor is None:
            continue
        first = tensor.device if first is None else first
        if tensor.device != first:
            devices = {name: t.device for name, t in tensors.items() if t is not None}
            raise ValueError(
                f"{op}: all tensors must be on one device, got {', '.join(f'{n} on {d}' for n, d in devices.items())}"
            )
    assert first is not None
    return first.type == "cuda"


@cache
def element_type(dtype: torch.dtype) -> Any:
    """Triton's name of a floating-point dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))


@jit
def table_entry(table, pid, COUNT: tl.constexpr, FIELDS: tl.constexpr):
    """Which of the COUNT rows of a table program `pid` works on, and the program's number within it. The last of a
    row's FIELDS int64 is its first program."""
    m = 0
    for i in tl.static_range(1, COUNT):  # type: ignore[reportGeneralTypeIssues]
        m += (pid >= tl.load(table + i * FIELDS + FIELDS - 1).to(tl.int32)).to(tl.int32)
    return m, pid - tl.load(table + m * FIELDS + FIELDS - 1).to(tl.int32)


_HERE = nullcontext()


@cache
def _devices() -> int:
    return torch.cuda.device_count()


def _on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's, where it is not already. Asks nothing where there is
    one device: it is called dozens of times per layer."""
    if not tensor.is_cuda or _devices() == 1 or tensor.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


class _Forms:
    """What a kernel was compiled to, for each kind of call there was."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel  # held, so that no other one gets its id
        self.varying = tuple(i for i, p in enumerate(kernel.params) if p.do_not_specialize)
        self.found: dict[tuple, tuple[Any, tuple]] = {}
        """Kind of call -> the compiled kernel, and the values of what was given by name."""


_forms: dict[int, _Forms] = {}
"""Of the kernels, by their ids: Triton's own hash of one takes microseconds."""
ALIGNMENT = 64
"""Bytes. Triton compiles a kernel anew for addresses that are not multiples of 16; a finer rule would be met too."""
PLAIN = {float, bool, str, type(None)}
"""Types of arguments that are neither tensors nor integers."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)` on the device of the first argument, a tensor, and the current stream.

    arguments: in the kernel's order. constants: what it has behind them, and num_warps and the like.
    Triton looks at every argument and constant to find what it has compiled, 33 times per layer, which the host was
    held up by (benchmarks/host_time.py). A call like an earlier one goes straight to what that was compiled to, as
    Triton's tutorial on the fused softmax launches. Like: what Triton goes by, and finer, so that no rule of its own is
    needed here: the device, all types, each tensor's dtype and address modulo 64, and all numbers as they are but those
    of `VARYING`, whose values Triton is told not to look at.
    """
    with _on_device(arguments[0]):
        forms = _forms.get(id(kernel))
        if forms is None:
            if not hasattr(kernel, "params"):  # under the interpreter
                kernel[grid](*arguments, **constants)
                return
            forms = _forms[id(kernel)] = _Forms(kernel)
        # Of the types only integers stand for themselves: 1, 1.0 and True are equal.
        like = [
            a if (kind := a.__class__) is int else (kind, a) if kind in PLAIN else (a.dtype, a.data_ptr() % ALIGNMENT)
            for a in arguments
        ]
        for i in forms.varying:
            like[i] = arguments[i] >> 31
        key = (arguments[0].get_device(), *like, *constants.items(), *map(type, constants.values()))
        found = forms.found.get(key)
        if found is None:
            compiled = kernel[grid](*arguments, **constants)
            named = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
            forms.found[key] = (compiled, named)
        else:
            compiled, named = found
            compiled[(*grid, 1, 1)[:3]](*arguments, *named)


def check_args(op: str, ok: bool, wanted: str, **got: Tensor | None) -> None:
    """Raise ValueError saying what `op` wants and the shapes, dtypes and strides it got, unless `ok`."""
    if not ok:
        shown = ", ".join(
            f"{name} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} strides {t.stride()}"
            for name, t in got.items()
            if t is not None
        )
        raise ValueError(f"{op}: want {wanted}; got {shown}")


def as_rows(tensor: Tensor) -> Tensor:
    """[..., H] as [T, H] with adjacent columns, copied only where its strides make that necessary."""
    rows = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]
    return rows if rows.stride(1) == 1 else rows.contiguous()


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
