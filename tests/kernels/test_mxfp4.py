"""MXFP4 decode: every byte under every scale, transformers' own result, and experts with rows only."""

from __future__ import annotations

import pytest
import torch
from kernel_rule import DEVICE, DTYPES, QUIET, assert_rule
from test_grouped import ROWS, offsets_of
from test_nf4 import same_bits
from test_nf4_stack import INTERPRETED, buffer

from rlft.kernels.grouped import grouped_reference
from rlft.kernels.mxfp4 import (
    Mxfp4Weight,
    decode_mxfp4,
    decode_mxfp4_launch,
    decode_mxfp4_reference,
    mxfp4_grouped,
    mxfp4_grouped_launch,
    mxfp4_grouped_reference,
)

pytestmark = QUIET


def drawn(shape: tuple[int, int, int], low: int = 100, high: int = 140, device: str = DEVICE) -> Mxfp4Weight:
    """Any bytes, with scales of a range, in gpt-oss' shapes."""
    experts, N, K = shape
    g = torch.Generator().manual_seed(K)
    packed = torch.randint(256, (experts, N, K // 32, 16), dtype=torch.uint8, generator=g)
    e8m0 = torch.randint(low, high, (experts, N, K // 32), dtype=torch.uint8, generator=g)
    return Mxfp4Weight(packed.to(device), e8m0.to(device), shape)


def test_the_plain_version_is_transformers_result() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    weight = drawn((2, 6, 96), device="cpu")
    theirs = convert_moe_packed_tensors(weight.packed.clone(), weight.e8m0.clone(), dtype=torch.bfloat16)
    assert same_bits(decode_mxfp4_reference(weight, torch.bfloat16), theirs.transpose(1, 2))


def test_every_value_under_every_scale() -> None:
    """Against the definition of e2m1 from its bits, in float64; fp32 and the kernel, subnormal scales and NaN too."""
    packed = torch.arange(16, dtype=torch.uint8).repeat(256) * 17  # both nibbles of a byte
    weight = Mxfp4Weight(packed.to(DEVICE), torch.arange(256, dtype=torch.uint8, device=DEVICE), (1, 256, 32))

    def number(nibble: int) -> float:
        exponent, mantissa = nibble >> 1 & 3, nibble & 1
        return (-1) ** (nibble >> 3) * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))

    numbers = torch.tensor([number(j // 2) for j in range(32)], dtype=torch.float64)
    want = (numbers * torch.exp2(torch.arange(256, dtype=torch.float64) - 127)[:, None]).float().to(DEVICE)
    want[255] = float("nan")
    out = torch.empty(1, 256, 32, device=DEVICE)
    decode_mxfp4_launch(weight, out, None, 1)
    for got in (out[0], decode_mxfp4_reference(weight, torch.float32)[0]):
        assert got[255].isnan().all() and torch.equal(got[:255], want[:255])
        assert torch.equal(got[:255, 16:].signbit(), torch.ones_like(got[:255, 16:], dtype=torch.bool))


# Blocks that fill no tile; gpt-oss' 90 blocks a row; tiles that cross rows.
@pytest.mark.parametrize("shape", [(3, 5, 32), (2, 1, 2880), (2, 11, 96)])
@pytest.mark.parametrize("dtype", INTERPRETED)
def test_the_kernel_has_the_bits_of_the_plain_version(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    weight = drawn(shape)
    whole, out = buffer(shape, dtype)
    decode_mxfp4_launch(weight, out, None, shape[0])
    assert same_bits(out, decode_mxfp4_reference(weight, dtype))
    assert int((whole == 7).sum()) >= whole.numel() - out.numel()


def test_only_experts_with_rows_are_decoded() -> None:
    weight, offsets = drawn((4, 3, 64)), offsets_of([0, 2, 0, 1])
    plain, out = torch.full((4, 3, 64), 7.0, device=DEVICE), torch.full((4, 3, 64), 7.0, device=DEVICE)
    decode_mxfp4(weight, plain, offsets)
    decode_mxfp4_launch(weight, out, offsets, 3)
    want = decode_mxfp4_reference(weight, torch.float32)
    assert same_bits(out, plain) and torch.equal(out[[1, 3]], want[[1, 3]]) and (out[[0, 2]] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case, N, K", [("none", 5, 64), ("the last without", 70, 96), ("all rows of one", 20, 160)])
def test_the_product_obeys_the_rule(case: str, N: int, K: int, dtype: torch.dtype) -> None:
    rows = ROWS[case]
    g = torch.Generator().manual_seed(N)
    weight, offsets = drawn((len(rows), N, K), 120, 128), offsets_of(rows)
    x, bias = (torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in ((sum(rows), K), (len(rows), N)))
    got = mxfp4_grouped_launch(x, weight, offsets, bias, x.new_empty(sum(rows), N))
    w = decode_mxfp4_reference(weight, dtype).double()
    plain = mxfp4_grouped_reference(x, weight, offsets, bias)
    assert_rule("y", got, plain, grouped_reference(x.double(), w, offsets, bias.double()), 2)


def test_what_does_not_fit_is_refused() -> None:
    good = drawn((2, 3, 64))
    for packed, e8m0, shape in (
        (good.packed[1:], good.e8m0, good.shape),
        (good.packed, good.e8m0.int(), good.shape),
        (good.packed, good.e8m0, (2, 3, 72)),
    ):
        with pytest.raises(ValueError, match="Mxfp4Weight: want uint8 blocks and scales"):
            Mxfp4Weight(packed, e8m0, shape)
    x = torch.randn(3, 64, device=DEVICE)
    assert mxfp4_grouped(x, good, offsets_of([1, 2])).shape == (3, 3)
    for rows, counts in ((x[:, :32], [1, 2]), (x, [1, 1, 1])):
        with pytest.raises(ValueError, match=r"mxfp4_grouped: want x \[M, 64\] and offsets \[3\]"):
            mxfp4_grouped(rows, good, offsets_of(counts))
    with pytest.raises(ValueError, match=r"decode_mxfp4: want an output \[2, 3, 64\]"):
        decode_mxfp4(good, torch.empty(2, 3, 32, device=DEVICE))
    with pytest.raises(ValueError, match=r"decode_mxfp4: want out \[E, N, K\]"):
        decode_mxfp4(good, torch.empty(2, 3, 64, device=DEVICE, dtype=torch.float64))


@pytest.mark.gpu
def test_gpu_a_layer_of_gpt_oss() -> None:
    weight = drawn((32, 5760, 2880))
    out = torch.empty(32, 5760, 2880, device="cuda", dtype=torch.bfloat16)
    decode_mxfp4(weight, out)
    assert same_bits(out, decode_mxfp4_reference(weight, torch.bfloat16))
    x, offsets = torch.randn(64, 2880, device="cuda", dtype=torch.bfloat16), offsets_of([2] * 32)
    truth = grouped_reference(x.double(), out.double(), offsets)
    assert_rule("y", mxfp4_grouped(x, weight, offsets), grouped_reference(x, out, offsets), truth, 2)
