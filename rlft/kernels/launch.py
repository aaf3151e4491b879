"""What every kernel file needs around its launches: which path the tensors take, and its checks at the public edge.

The device decides and nothing else: CUDA tensors take the Triton kernel, CPU tensors the PyTorch reference. With
TRITON_INTERPRET=1 (set before triton is imported) the tests call the launchers themselves on CPU tensors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING or importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    def jit(function: Callable[..., Any]) -> Any:
        """triton.jit; the function itself where there is no Triton (macOS, Windows), whose tensors are on the CPU."""
        return triton.jit(function)
else:
    tl = None

    def jit(function: Callable[..., Any]) -> Any:
        """The function itself: nothing launches it here."""
        return function


def on_gpu(op: str, **tensors: Tensor | None) -> bool:
    """True when all tensors are on one CUDA device, False when all are on the CPU.

    op: name of the public function, for the error. Raises ValueError naming the devices when they are mixed.
    """
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(
            f"{op}: all tensors must be on one device, got {', '.join(f'{n} on {d}' for n, d in devices.items())}"
        )
    return next(iter(devices.values())).type == "cuda"


def want(op: str, ok: bool, wanted: str, **got: Tensor | None) -> None:
    """Raise ValueError saying what `op` wants and the shapes, dtypes and strides it got, unless `ok`."""
    if not ok:
        shown = ", ".join(
            f"{name} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} strides {t.stride()}"
            for name, t in got.items()
            if t is not None
        )
        raise ValueError(f"{op}: want {wanted}; got {shown}")
