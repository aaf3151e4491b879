"""lora_add: the accuracy rule, projections of any width, parts of K, rows with strides, refusals."""

from __future__ import annotations

import pytest
import torch
from kernel_rule import DEVICE, DTYPES, QUIET, assert_rule, assert_survives_stream_and_graph
from torch import Tensor

from rlft.kernels.lora_add import lora_add, lora_add_kernel, lora_add_reference

pytestmark = QUIET

SHAPES = [
    (0, 64, (32,), 16),  # nothing to do
    (1, 576, (576, 192, 192), 16),  # SmolLM2's q, k, v: tiles that are not full
    (5, 1536, (576,), 16),  # several parts, the last one short
    (3, 70, (33, 130), 16),  # widths and columns that no tile divides
    (70, 300, (24, 8), 32),  # more rows than a tile; ranks of all projections fill a tile
    (2, 130, (40, 40, 40), 64),  # three tiles of ranks
    (20, 64, (150,), 128),  # ranks in several blocks, two programs of columns
]


def draw(T: int, K: int, sizes: tuple[int, ...], rank: int, dtype: torch.dtype) -> list[Tensor]:
    """y, x, a, b. A is scaled as PEFT begins it; the last rank is zero, as where an adapter does not fill its room."""
    torch.manual_seed(3)
    a, b = torch.randn(len(sizes) * rank, K) / K**0.5, torch.randn(sum(sizes), rank) * 0.1
    b[:, -1] = 0
    return [t.to(DEVICE, dtype) for t in (torch.randn(T, sum(sizes)), torch.randn(T, K), a, b)]


def added(inputs: list[Tensor], sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """By the reference, in a dtype."""
    y, x, a, b = (t.to(dtype, copy=True) for t in inputs)
    lora_add_reference(y, x, a, b, sizes)
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, K, sizes, rank", SHAPES)
def test_kernel_obeys_the_rule(T: int, K: int, sizes: tuple[int, ...], rank: int, dtype: torch.dtype) -> None:
    inputs = draw(T, K, sizes, rank, dtype)
    plain, truth = added(inputs, sizes, dtype), added(inputs, sizes, torch.float64)
    y = inputs[0].clone()
    lora_add_kernel(y, *inputs[1:], sizes)
    assert_rule("y", y, plain, truth, 2)


def test_reference_is_the_formula() -> None:
    y, x, a, b = (t.double() for t in draw(4, 10, (3, 5), 16, torch.float32))
    want = y + torch.cat([x @ a[:16].T @ b[:3].T, x @ a[16:].T @ b[3:].T], dim=1)
    assert torch.allclose(added([y, x, a, b], (3, 5), torch.float64), want, rtol=0, atol=1e-12)


def test_rows_with_strides_and_what_lies_between_them() -> None:
    y, x, a, b = draw(6, 96, (48, 16), 16, torch.float32)
    want = y.clone()
    lora_add_kernel(want, x, a, b, (48, 16))
    wide_x, wide_y = (torch.full((6, n), float("nan"), device=DEVICE) for n in (100, 70))
    wide_x[:, :96], wide_y[:, :64] = x, y
    lora_add_kernel(wide_y[:, :64], wide_x[:, :96], a, b, (48, 16))
    assert torch.equal(wide_y[:, :64], want) and wide_y[:, 64:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("T", [16, 256, 2048])
def test_large_shapes_streams_and_graphs(T: int) -> None:
    sizes = (4096, 1024, 1024)
    y, x, a, b = draw(T, 4096, sizes, 16, torch.bfloat16)
    plain, truth = added([y, x, a, b], sizes, torch.bfloat16), added([y, x, a, b], sizes, torch.float64)

    def run() -> list[Tensor]:
        out = y.clone()
        lora_add(out, x, a, b, sizes)
        return [out]

    assert_rule("y", run()[0], plain, truth, 2)
    assert_survives_stream_and_graph(run)


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    y, x, a, b = draw(2, 32, (8, 8), 16, torch.float32)
    between = torch.randn(16, 24, device=DEVICE)  # a rank that is no power of two, and rows that are not adjacent
    others = [(y, x, torch.cat([a, a])[:48], between), (y, x, a, between[:, :16])]
    for wrong in (
        (y[:, :8], x, a, b),
        (y, x, a[:16], b),
        (y, x, a, b[:, :8].contiguous()),
        (y, x.double(), a, b),
        *others,
    ):
        with pytest.raises(ValueError, match="lora_add: want x"):
            lora_add(*wrong, (8, 8))
