"""Products with packed experts: the accuracy rule against float64 of the decoded weights, odd shapes, refusals."""

from __future__ import annotations

import pytest
import torch
from kernel_rule import DEVICE, DTYPES, QUIET, assert_rule, assert_survives_stream_and_graph, unread
from test_grouped import ROWS, offsets_of
from test_nf4 import made
from torch import Tensor

from rlft.kernels.grouped import grouped_reference
from rlft.kernels.nf4 import Nf4Weight, decode_reference
from rlft.kernels.nf4_grouped import Tile, nf4_grouped, nf4_grouped_launch, nf4_grouped_reference, tile_of

pytestmark = QUIET

SHAPES = [*((case, 20, 64) for case in ROWS), ("the last without", 70, 192)]
"""Rows, N and K: fewer columns than a tile; two tiles of columns, and a last step that ends within a tile."""


def drawn(rows: list[int], N: int, K: int, dtype: torch.dtype, blocksize: int = 64) -> tuple[Tensor, Nf4Weight, Tensor]:
    """x [M, K] with a tail that is not to be read, the packed stack, bias [E, N]."""
    g = torch.Generator().manual_seed(N)
    weight = made((len(rows) * N, K), blocksize, True, DEVICE)
    x = torch.full((sum(rows), K + 8), unread(dtype), dtype=dtype, device=DEVICE)[:, :K]
    x.copy_(torch.randn(sum(rows), K, generator=g) / K**0.5)
    return x, weight, torch.randn(len(rows), N, generator=g).to(DEVICE, dtype)


def check(rows: list[int], N: int, K: int, dtype: torch.dtype, blocksize: int = 64, tile: Tile | None = None) -> None:
    x, weight, bias = drawn(rows, N, K, dtype, blocksize)
    offsets, shape = offsets_of(rows), (len(rows), N, K)
    out = torch.full((sum(rows), N + 3), 7.0, dtype=dtype, device=DEVICE)
    got = nf4_grouped_launch(x, weight, offsets, bias, out[:, :N], tile)
    plain = nf4_grouped_reference(x, weight, shape, offsets, bias)
    w = decode_reference(weight, dtype).view(shape).double()
    assert_rule("y", got, plain, grouped_reference(x.double(), w, offsets, bias.double()), 2)
    assert (out[:, N:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case, N, K", SHAPES)
def test_the_kernel_obeys_the_rule(case: str, N: int, K: int, dtype: torch.dtype) -> None:
    check(ROWS[case], N, K, dtype)


@pytest.mark.parametrize("blocksize", [32, 128])
def test_other_blocks_and_tiles(blocksize: int) -> None:
    check([0, 40, 3], 24, 256, torch.float32, blocksize, Tile(16, 16, 128, 4, 2))


def test_rows_choose_the_tile() -> None:
    assert tile_of(1, 2) == Tile(16, 64, 64, 4, 4) and tile_of(20, 2).rows == tile_of(500, 2).rows == 64


def test_what_does_not_fit_is_refused() -> None:
    rows = [1, 2]
    x, weight, bias = drawn(rows, 8, 64, torch.float32)
    offsets = offsets_of(rows)
    assert nf4_grouped(x, weight, offsets, bias=bias).shape == (3, 8)
    for call in (
        lambda: nf4_grouped(x, weight, offsets.long()),
        lambda: nf4_grouped(x, weight, offsets, out=x),
        lambda: nf4_grouped(x, weight, offsets, bias=bias[:1]),
    ):
        with pytest.raises(ValueError, match=r"nf4_grouped: want x \[M, K\]"):
            call()
    with pytest.raises(ValueError, match="nf4_grouped: want weights in blocks of at most 128, got blocks of 256"):
        nf4_grouped(torch.zeros(3, 256, device=DEVICE), made((16, 256), 256, device=DEVICE), offsets)
    with pytest.raises(ValueError, match="nf4_grouped: want 2 experts"):
        nf4_grouped(x[:, :32], weight, offsets)


@pytest.mark.gpu
@pytest.mark.parametrize("N, K", [(1536, 2048), (2048, 768), (5760, 2880)])
@pytest.mark.parametrize("tokens", [1, 16, 256])
def test_gpu(tokens: int, N: int, K: int) -> None:
    chosen = torch.randint(32, (tokens * 4,), generator=torch.Generator().manual_seed(0))
    rows = torch.bincount(chosen, minlength=32).tolist()
    for dtype in (torch.bfloat16, torch.float16):
        check(rows, N, K, dtype)
    x, weight, bias = drawn(rows, N, K, torch.bfloat16)
    offsets = offsets_of(rows)
    assert_survives_stream_and_graph(lambda: (nf4_grouped(x, weight, offsets, bias=bias),))
