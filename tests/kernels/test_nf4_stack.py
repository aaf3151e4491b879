"""Decoding a stack of experts: the bits of the matrix it is, in buffers with tails, and experts with rows only."""

from __future__ import annotations

import pytest
import torch
from kernel_rule import DEVICE, QUIET
from test_grouped import offsets_of
from test_nf4 import made, same_bits
from torch import Tensor

from rlft.kernels.nf4 import Nf4Weight, decode_reference
from rlft.kernels.nf4_stack import decode_stack, decode_stack_launch

pytestmark = QUIET

INTERPRETED = (torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu))


def buffer(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A buffer with a tail behind rows and below experts, all 7, and the view for the weights."""
    experts, N, K = shape
    whole = torch.full((experts, N + 3, K + 8), 7.0, dtype=dtype, device=DEVICE)
    return whole, whole[:, :N, :K]


# Blocks that fill no tile; gpt-oss' odd number of blocks per row; tiles that cross rows; one expert; several tiles.
@pytest.mark.parametrize("shape", [(3, 5, 64), (2, 2, 2880), (4, 9, 192), (1, 3, 1024)])
@pytest.mark.parametrize("dtype", INTERPRETED)
def test_a_stack_has_the_bits_of_its_matrix(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for nested, blocksize in ((False, 64), (True, 64), (True, 32)):
        weight = made((shape[0] * shape[1], shape[2]), blocksize, nested, DEVICE)
        whole, out = buffer(shape, dtype)
        decode_stack_launch(weight, out, None, shape[0])
        assert same_bits(out, decode_reference(weight, dtype).view(shape)), (nested, blocksize)
        assert int((whole == 7).sum()) == whole.numel() - out.numel()


@pytest.mark.parametrize("rows", [[0, 2, 0, 1], [0, 0, 0, 0], [0, 0, 0, 9]])
def test_only_experts_with_rows_are_decoded(rows: list[int]) -> None:
    weight, offsets = made((4 * 130, 64), device=DEVICE), offsets_of(rows)
    want = decode_reference(weight, torch.float32).view(4, 130, 64)
    plain = torch.full_like(want, 7.0)
    decode_stack(weight, plain, offsets)
    # Two programs per expert, the last one not full; for as many experts as can have rows, and more.
    for most in {min(4, sum(rows)), 3}:
        out = torch.full_like(want, 7.0)
        decode_stack_launch(weight, out, offsets, most)
        for e, n in enumerate(rows):
            assert same_bits(out[e], want[e] if n else torch.full_like(want[e], 7.0))
        assert torch.equal(out, plain)


def test_what_does_not_fit_is_refused() -> None:
    weight = made((8, 64))
    decode_stack(weight, torch.empty(2, 4, 64))
    for out in (torch.empty(2, 4, 65)[:, :, :64], torch.empty(8, 64), torch.empty(2, 4, 64, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"decode_stack: want out \[E, N, K\]"):
            decode_stack(weight, out)
    for out in (torch.empty(2, 5, 64), torch.empty(2, 8, 32)):
        with pytest.raises(ValueError, match="decode_stack: want 2 experts of"):
            decode_stack(weight, out)
    with pytest.raises(ValueError, match="rows of whole blocks of 64; the weight has shape"):
        decode_stack(made((8, 72)), torch.empty(2, 4, 72))
    with pytest.raises(ValueError, match="offsets"):
        decode_stack(weight, torch.empty(2, 4, 64), offsets_of([1, 2, 3], "cpu"))


@pytest.mark.gpu
def test_gpu_a_layer_of_qwen3_30b_a3b() -> None:
    shape = (128, 1536, 2048)
    weight: Nf4Weight = made((shape[0] * shape[1], shape[2]), device="cuda")
    whole = torch.zeros(128, 1536 + 16, 2048 + 16, device="cuda", dtype=torch.bfloat16)
    out = whole[:, :1536, :2048]
    decode_stack(weight, out)
    want = decode_reference(weight, torch.bfloat16).view(shape)
    assert same_bits(out, want)
    rows = [1 if e % 16 == 3 else 0 for e in range(128)]
    whole.zero_()
    offsets = offsets_of(rows)
    graph = torch.cuda.CUDAGraph()
    decode_stack(weight, out, offsets, rows=8)
    whole.zero_()
    with torch.cuda.graph(graph):
        decode_stack(weight, out, offsets, rows=8)
    graph.replay()
    for e, n in enumerate(rows):
        assert same_bits(out[e], want[e]) if n else not out[e].any()
