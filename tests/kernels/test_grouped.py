"""Grouped products: the accuracy rule over odd shapes, both back ends, LoRA in the tail of buffers, refusals."""

from __future__ import annotations

import pytest
import torch
from kernel_rule import DEVICE, DTYPES, QUIET, assert_rule, assert_survives_stream_and_graph, unread
from torch import Tensor

from rlft.kernels.expert_tiles import most_tiles
from rlft.kernels.grouped import (
    Tile,
    by_grouped_mm,
    grouped,
    grouped_launch,
    grouped_reference,
    grouped_transposed,
    grouped_transposed_reference,
    takes_grouped_mm,
    tile_of,
)

pytestmark = QUIET

ROWS = {
    "none": [0, 0, 0],
    "one row": [0, 1, 0],
    "one expert": [37],
    "all rows of one": [0, 0, 50, 0],
    "the last without": [3, 40, 17, 0],
    "128 experts": [1 if e % 9 == 0 else 0 for e in range(128)],
}
"""Rows of each expert."""
SHAPES = [*((case, 33, 17) for case in ROWS), ("the last without", 40, 72), ("all rows of one", 130, 16)]
"""Rows, N and K: odd; several steps, the last one short; several tiles of columns."""


def offsets_of(rows: list[int], device: str = DEVICE) -> Tensor:
    return torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32, device=device)


def drawn(rows: list[int], N: int, K: int, dtype: torch.dtype, device: str = DEVICE) -> tuple[Tensor, ...]:
    """x [M, K], dy [M, N], w [E, N, K], bias [E, N]."""
    g = torch.Generator().manual_seed(N + len(rows))
    shapes = (sum(rows), K), (sum(rows), N), (len(rows), N, K), (len(rows), N)
    return tuple((torch.randn(shape, generator=g) / shape[-1] ** 0.5).to(device, dtype) for shape in shapes)


def within(shape: tuple[int, ...], dtype: torch.dtype, tail: int = 5) -> Tensor:
    """A view with a tail behind each row, of what is not to be read."""
    buffer = torch.full((*shape[:-1], shape[-1] + tail), unread(dtype), dtype=dtype, device=DEVICE)
    return buffer[..., : shape[-1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case, N, K", SHAPES)
def test_the_kernel_obeys_the_rule(case: str, N: int, K: int, dtype: torch.dtype) -> None:
    rows = ROWS[case]
    x, dy, w, bias = drawn(rows, N, K, dtype)
    offsets, wd = offsets_of(rows), w.double()
    wide = within(w.shape, dtype).copy_(w), within(x.shape, dtype).copy_(x), within(dy.shape, dtype).copy_(dy)
    y = grouped_launch(wide[1], wide[0].transpose(1, 2), offsets, bias, within(dy.shape, dtype))
    truth = grouped_reference(x.double(), wd, offsets, bias.double())
    assert_rule("y", y, grouped_reference(x, w, offsets, bias), truth, 2)
    dx = grouped_launch(wide[2], wide[0], offsets, None, torch.empty_like(x))
    truth = grouped_transposed_reference(dy.double(), wd, offsets)
    assert_rule("dx", dx, grouped_transposed_reference(dy, w, offsets), truth, 2)


@pytest.mark.parametrize("tile", [Tile(16, 16, 32, 4, 2), Tile(16, 64, 64, 4, 2), Tile(64, 16, 16, 4, 2)])
def test_every_tile_gives_the_product(tile: Tile) -> None:
    """Several tiles of rows per expert, more than run together, and steps that end within K."""
    rows = [0, 70, 1, 33]
    x, _, w, _ = drawn(rows, 50, 40, torch.float32)
    got = grouped_launch(x, w.transpose(1, 2), offsets_of(rows), None, x.new_empty(104, 50), tile)
    torch.testing.assert_close(got, grouped_reference(x, w, offsets_of(rows)))


def test_plain_versions_are_a_loop_and_gradients_of_each_other() -> None:
    rows = [2, 0, 3]
    x, dy, w, bias = (t.requires_grad_() for t in drawn(rows, 4, 3, torch.float64, "cpu"))
    offsets = offsets_of(rows, "cpu")
    y = grouped(x, w, offsets, bias=bias)
    expert = torch.tensor([0, 0, 2, 2, 2])
    torch.testing.assert_close(y, torch.einsum("mk,mnk->mn", x, w[expert]) + bias[expert])
    assert torch.autograd.gradcheck(lambda x, w, b: grouped_reference(x, w, offsets, b), (x, w, bias))
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(grouped_transposed(dy, w, offsets), dx)
    none = offsets_of([0, 0, 0], "cpu")
    assert grouped(x[:0], w, none).shape == (0, 4) and grouped_transposed(dy[:0], w, none).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lora_in_the_tail_is_the_formula(dtype: torch.dtype) -> None:
    """The four products of the file's head on one buffer, by the kernel in fp32 and in plain PyTorch in float64."""
    rows, N, K, tail = [3, 0, 20], 24, 40, 16
    x, dy, w, _ = drawn(rows, N, K, dtype)
    offsets, factor = offsets_of(rows), 0.5
    A, B = (torch.randn(shape, dtype=dtype, device=DEVICE) for shape in ((3, tail, K), (3, N, tail)))
    buffer = torch.full((3, N + tail, K + tail), float("nan"), dtype=dtype, device=DEVICE)
    buffer[:, :N, :K], buffer[:, :N, K:], buffer[:, N:, :K] = w, factor * B, A
    rows_x, rows_dy = (torch.cat([t, t.new_zeros(23, tail)], 1) for t in (x, dy))

    def forward(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
        if dtype == torch.float64:
            return grouped(x, w, offsets, out)
        return grouped_launch(x, w.mT, offsets, None, x.new_empty(23, w.shape[1]) if out is None else out)

    def transposed(dy: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
        if dtype == torch.float64:
            return grouped_transposed(dy, w, offsets, out)
        return grouped_launch(dy, w, offsets, None, x.new_empty(23, w.shape[2]) if out is None else out)

    forward(rows_x[:, :K], buffer[:, N:, :K], rows_x[:, K:])
    y = forward(rows_x, buffer[:, :N])
    transposed(rows_dy[:, :N], buffer[:, :N, K:], rows_dy[:, N:])
    dx = transposed(rows_dy, buffer[:, :, :K])
    expert = torch.tensor([0] * 3 + [2] * 20)
    merged = (w + factor * B @ A)[expert]
    torch.testing.assert_close(y, torch.einsum("mk,mnk->mn", x, merged))
    torch.testing.assert_close(dx, torch.einsum("mn,mnk->mk", dy, merged))


def test_pytorchs_grouped_mm_gives_the_same() -> None:
    """On a CPU it computes in fp32; weights are views of a buffer with a tail, forward and transposed."""
    rows = [0, 21, 5, 0]
    x, dy, w, _ = drawn(rows, 32, 48, torch.float32, "cpu")
    offsets, buffer = offsets_of(rows, "cpu"), torch.full((4, 40, 56), float("nan"))
    buffer[:, :32, :48] = w
    w = buffer[:, :32, :48]
    torch.testing.assert_close(by_grouped_mm(x, w.mT, offsets, None), grouped_reference(x, w, offsets))
    out = torch.empty(26, 60)[:, :48]
    assert by_grouped_mm(dy, w, offsets, out) is out
    torch.testing.assert_close(out, grouped_transposed_reference(dy, w, offsets))
    assert not takes_grouped_mm(x, w.mT, None)  # since x is on a CPU


def test_tiles_follow_rows_columns_and_layout() -> None:
    assert tile_of(512, 1536, 2, False) == Tile(128, 128, 64, 8, 3)
    assert tile_of(3, 1536, 2, False) == Tile(16, 128, 64, 4, 3)
    assert tile_of(512, 16, 2, True).warps == 2 and tile_of(512, 16, 2, False).warps == 4
    assert tile_of(512, 1536, 4, False) == Tile(64, 64, 32, 4, 2)


@pytest.mark.parametrize("case", ROWS)
def test_the_grid_has_room_for_every_tile(case: str) -> None:
    for size in (1, 3, 16, 128):
        assert sum(-(-n // size) for n in ROWS[case]) <= most_tiles(sum(ROWS[case]), size, len(ROWS[case]))


def test_what_does_not_fit_is_refused() -> None:
    rows = [2, 3]
    x, _, w, bias = drawn(rows, 8, 16, torch.float32)
    offsets = offsets_of(rows)
    for call in (
        lambda: grouped(x[:, 1:], w, offsets),
        lambda: grouped(x, w, offsets[1:]),
        lambda: grouped(x, w, offsets.long()),
        lambda: grouped(x, w.half(), offsets),
        lambda: grouped(x, w, offsets, out=x),
        lambda: grouped(x, w, offsets, bias=bias[:1]),
        lambda: grouped(x.T.contiguous().T, w, offsets),
        lambda: grouped(x, w[0], offsets),
    ):
        with pytest.raises(ValueError, match=r"grouped: want rows \[M, K\]"):
            call()
    with pytest.raises(ValueError, match=r"grouped_transposed: want rows \[M, N\]"):
        grouped_transposed(x, w, offsets)


@pytest.mark.gpu
@pytest.mark.parametrize("N, K", [(1536, 2048), (2048, 768), (16, 2048), (2048, 16)])
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_gpu(tokens: int, N: int, K: int) -> None:
    """A Qwen3-30B-A3B layer and its thin products in bf16, by both back ends where grouped_mm is taken."""
    chosen = torch.randint(128, (tokens * 8,), generator=torch.Generator().manual_seed(0))
    rows = torch.bincount(chosen, minlength=128).tolist()
    offsets = offsets_of(rows)
    buffer = torch.randn(128, N + 16, K + 16, device="cuda", dtype=torch.bfloat16) * K**-0.5
    w = buffer[:, :N, :K]
    x, dy = (torch.randn(tokens * 8, n + 16, device="cuda", dtype=torch.bfloat16)[:, :n] for n in (K, N))
    truths = grouped_reference(x.double(), w.double(), offsets), grouped_reference(dy.double(), w.double().mT, offsets)
    for rows_in, matrix, truth in zip((x, dy), (w.mT, w), truths, strict=True):
        plain = grouped_reference(rows_in, matrix.mT, offsets)
        got = grouped_launch(rows_in, matrix, offsets, None, torch.empty_like(plain))
        assert_rule("Triton", got, plain, truth, 2)
        if takes_grouped_mm(rows_in, matrix, None):
            assert_rule("grouped_mm", by_grouped_mm(rows_in, matrix, offsets, None), plain, truth, 2)
    assert_survives_stream_and_graph(lambda: (grouped(x, w, offsets), grouped_transposed(dy, w, offsets)))


@pytest.mark.gpu
def test_gpu_weights_beyond_2_31_elements() -> None:
    w = torch.zeros(300, 2048, 4096, device="cuda", dtype=torch.bfloat16)
    w[-1] = 1
    x = torch.ones(3, 4096, device="cuda", dtype=torch.bfloat16)
    y = grouped(x, w, offsets_of([0] * 299 + [3]))
    assert (y == 4096).all()
