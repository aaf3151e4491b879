"""Decode MXFP4 experts as gpt-oss has them, in plain PyTorch.

A stack [E, N, K] is cut into blocks of 32 elements of a row. Byte j of a block holds element 2j in its low nibble and
2j + 1 in its high one, an e2m1 number: sign, two bits of exponent, one of mantissa. Each block has a byte s:

    w = round(e2m1 2^(s - 127)),    s = 255 is NaN

The product is exact in fp32, and in bf16 but for subnormal results. Source: OCP Microscaling Formats 1.0, sections
5.3.3 and 5.4.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlft.kernels.launch import check_args

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The 16 values."""
BLOCK = 32
"""Elements of a block."""


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
        elements = torch.Size(self.shape).numel()
        check_args(
            "Mxfp4Weight",
            self.shape[2] % BLOCK == 0
            and self.packed.dtype == self.e8m0.dtype == torch.uint8
            and self.packed.numel() == elements // 2
            and self.e8m0.numel() == elements // BLOCK
            and self.packed.is_contiguous()
            and self.e8m0.is_contiguous(),
            f"uint8 blocks and scales of a stack {list(self.shape)}, rows of whole blocks of {BLOCK}, contiguous",
            packed=self.packed,
            e8m0=self.e8m0,
        )


def decode_mxfp4_reference(weight: Mxfp4Weight, dtype: torch.dtype) -> Tensor:
    """Compute the formula of this file: [E, N, K] in `dtype`."""
    pairs = torch.tensor([[E2M1[byte & 15], E2M1[byte >> 4]] for byte in range(256)], device=weight.packed.device)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    packed, e8m0 = weight.packed.view(len(out), -1), weight.e8m0.view(len(out), -1, 1)
    for expert, place in enumerate(out):
        values = torch.nn.functional.embedding(packed[expert].int(), pairs).view(-1, BLOCK)
        scales = torch.exp2(e8m0[expert].double() - 127).masked_fill(e8m0[expert] == 255, float("nan"))
        place.copy_((values * scales).view(place.shape))
    return out
