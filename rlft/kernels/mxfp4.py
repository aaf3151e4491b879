"""Decode MXFP4 experts as gpt-oss has them to bf16, fp16 or fp32: all of a layer in one launch, or those with rows.

A stack [E, N, K] is cut into blocks of 32 elements of a row. Byte j of a block holds element 2j in its low nibble and
2j + 1 in its high one, an e2m1 number: sign, two bits of exponent, one of mantissa. Each block has a byte s:

    w = round(e2m1 2^(s - 127)),    s = 255 is NaN

w is exact in fp32, and in bf16 but for subnormal numbers. The kernels are those of `rlft.kernels.nf4_stack` and, for
products y with few rows x per expert, of `rlft.kernels.nf4_grouped`; nibbles, values and scales are others. There is no
backward, since the base is frozen. Source: OCP Microscaling Formats 1.0, sections 5.3.3 and 5.4.1. Bytes per element:
reads 0.5 + 1/32, writes 2 (bf16).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlft.kernels.grouped import grouped_reference
from rlft.kernels.launch import check_args, on_gpu
from rlft.kernels.nf4_grouped import Tile, check_rows, packed_launch
from rlft.kernels.nf4_stack import bits_of, check_out, copy_experts, decode_launch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The 16 values."""
BLOCK = 32
"""Elements of a block."""
FORM: dict[str, Any] = {"BLOCK": BLOCK, "NESTED": -1, "BITS": bits_of(E2M1), "FLIP": 0}
"""Constants of the kernels."""


@dataclass(frozen=True, eq=False)
class Mxfp4Weight:
    """A view of the packed experts of a layer; nothing is copied.

    packed: uint8 of E N K / 2 bytes, as gpt-oss' `blocks` [E, N, K / 32, 16]. e8m0: uint8, a scale per block, as its
    `scales` [E, N, K / 32]. shape: (E, N, K). Raises ValueError on sizes and dtypes that do not fit.
    """

    packed: Tensor
    e8m0: Tensor
    shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        E, N, K = self.shape
        check_args(
            "Mxfp4Weight",
            K % BLOCK == 0
            and self.packed.dtype == self.e8m0.dtype == torch.uint8
            and self.packed.numel() == E * N * K // 2
            and self.e8m0.numel() == E * N * K // BLOCK
            and self.packed.is_contiguous()
            and self.e8m0.is_contiguous(),
            f"uint8 blocks and scales of {E} experts [{N}, {K}], rows of whole blocks of {BLOCK}, contiguous",
            packed=self.packed,
            e8m0=self.e8m0,
        )

    @property
    def numel(self) -> int:
        """Number of elements of the decoded stack."""
        return self.shape[0] * self.shape[1] * self.shape[2]


def decode_mxfp4_reference(weight: Mxfp4Weight, dtype: torch.dtype) -> Tensor:
    """Compute the formula of this file: [E, N, K] in `dtype`."""
    pairs = torch.tensor([[E2M1[byte & 15], E2M1[byte >> 4]] for byte in range(256)], device=weight.packed.device)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    packed, e8m0 = weight.packed.view(len(out), -1), weight.e8m0.view(len(out), -1, 1)
    for expert, place in enumerate(out):  # one at a time, since they are float64 here
        values = torch.nn.functional.embedding(packed[expert].int(), pairs).view(-1, BLOCK)
        scales = torch.exp2(e8m0[expert].double() - 127).masked_fill(e8m0[expert] == 255, float("nan"))
        place.copy_((values * scales).float().view(place.shape))
    return out


def _pointers(weight: Mxfp4Weight) -> tuple[Tensor | None, ...]:
    """Return what the kernels read. Raises ValueError for bytes that do not begin at a 16-byte address."""
    packed = weight.packed
    check_args("Mxfp4Weight", packed.data_ptr() % 16 == 0, "packed bytes at a 16-byte address", packed=packed)
    return packed.view(-1).view(torch.int32), weight.e8m0, None, None, None


def decode_mxfp4_launch(weight: Mxfp4Weight, out: Tensor, offsets: Tensor | None, most: int) -> None:
    """Compute `decode_mxfp4` by the kernel. most: experts that can have rows."""
    decode_launch(_pointers(weight), offsets, out, most, **FORM)


def decode_mxfp4(weight: Mxfp4Weight, out: Tensor, offsets: Tensor | None = None, rows: int | None = None) -> None:
    """Decode a stack into out [E, N, K]: all experts, or with offsets only those that have rows.

    Arguments and errors as `rlft.kernels.nf4_stack.decode_stack`.
    """
    check_out("decode_mxfp4", out, offsets)
    check_args("decode_mxfp4", tuple(out.shape) == weight.shape, f"an output {list(weight.shape)}", out=out)
    experts = out.shape[0]
    if on_gpu("decode_mxfp4", out=out, packed=weight.packed, offsets=offsets):
        decode_mxfp4_launch(weight, out, offsets, experts if offsets is None or rows is None else min(rows, experts))
    else:
        copy_experts(decode_mxfp4_reference(weight, out.dtype), out, offsets)


def mxfp4_grouped_reference(x: Tensor, weight: Mxfp4Weight, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `mxfp4_grouped` in plain PyTorch."""
    dtype = torch.float32 if x.dtype == torch.float64 else x.dtype
    return grouped_reference(x, decode_mxfp4_reference(weight, dtype).to(x.dtype), offsets, bias)


def mxfp4_grouped_launch(
    x: Tensor, weight: Mxfp4Weight, offsets: Tensor, bias: Tensor | None, out: Tensor, tile: Tile | None = None
) -> Tensor:
    """Compute `mxfp4_grouped` by the kernel."""
    return packed_launch(x, _pointers(weight), offsets, bias, out, tile, **FORM)


def mxfp4_grouped(
    x: Tensor, weight: Mxfp4Weight, offsets: Tensor, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Compute y [M, N] = x w_e^T + bias_e from the packed weights, e the expert of each row.

    Arguments and errors as `rlft.kernels.nf4_grouped.nf4_grouped`.
    """
    experts, N, K = weight.shape
    check_rows("mxfp4_grouped", x, N, offsets, out, bias)
    check_args(
        "mxfp4_grouped",
        x.shape[1] == K and offsets.numel() == experts + 1,
        f"x [M, {K}] and offsets [{experts + 1}]",
        x=x,
        offsets=offsets,
    )
    if on_gpu("mxfp4_grouped", x=x, packed=weight.packed, offsets=offsets, out=out, bias=bias):
        return mxfp4_grouped_launch(x, weight, offsets, bias, x.new_empty(x.shape[0], N) if out is None else out)
    y = mxfp4_grouped_reference(x, weight, offsets, bias)
    return y if out is None else out.copy_(y)
