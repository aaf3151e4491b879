"""A group's columns and the adapters written into its operands."""

from __future__ import annotations

import pytest
import torch

from rlft.kernels.lora_group import AdapterWriteTables, LoraGroup, Part, write_adapters, write_adapters_reference


def test_columns_and_rows_by_hand() -> None:
    """q with rank 16, k without adapter, v with rank 5: 21 columns, rounded up to 32."""
    group = LoraGroup(64, (128, 32, 32), (16, 0, 5), (2.0, 1.0, 0.5), align=16)
    assert (group.out, group.rank, group.tail, group.adapted) == (192, 21, 32, (0, 2))
    assert [group.rows(i) for i in range(3)] == [slice(0, 128), slice(128, 160), slice(160, 192)]
    assert [group.columns(i) for i in range(3)] == [slice(0, 16), slice(16, 16), slice(16, 21)]
    assert LoraGroup(64, (8,), (0,), (1.0,)).tail == 0 and LoraGroup(64, (8,), (16,), (1.0,)).tail == 64


# (3, 0, 5): odd ranks, one projection without. (16,): nothing to pad. Of fp32 masters or of a 16-bit shadow.
@pytest.mark.parametrize("ranks", [(16, 16, 16), (3, 0, 5), (16,), (0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fill_by_kernel_and_reference(ranks, dtype) -> None:
    torch.manual_seed(0)
    outs = (40, 24, 33)[: len(ranks)]
    group = LoraGroup(72, outs, ranks, (2.0, 3.0, 0.7)[: len(ranks)], align=16)
    A = [torch.randn(r, 72, dtype=dtype) for r in ranks]
    B = [torch.randn(o, r, dtype=dtype) for o, r in zip(outs, ranks, strict=True)]
    results = []
    for write in (write_adapters, lambda *given: AdapterWriteTables([Part(*given)]).launch(), write_adapters_reference):
        # Views of one buffer, as beside and below a weight.
        weight = torch.full((group.out + group.tail, 72 + group.tail), float("nan"), dtype=torch.float16)
        b, a = weight[: group.out, 72:], weight[group.out :, :72]
        write(group, A, B, b, a)
        assert torch.isnan(weight[: group.out, :72]).all() and torch.isnan(weight[group.out :, 72:]).all()
        results.append((b, a))
    for b, a in results:
        assert torch.equal(b, results[0][0]) and torch.equal(a, results[0][1])
        for i in group.adapted:
            assert torch.equal(b[group.rows(i), group.columns(i)], (B[i].float() * group.scales[i]).half())
            assert torch.equal(a[group.columns(i)], A[i].half())
        # Every other element is zero: a sum over all equals the sum over the blocks.
        assert b.count_nonzero() <= sum(B[i].numel() for i in group.adapted)
        assert not a[group.rank :].any() and not b[:, group.rank :].any()


def test_bad_input_says_what_it_wants() -> None:
    with pytest.raises(ValueError, match="1 to 6 out_features"):
        LoraGroup(64, (8, 8), (4,), (1.0,))
    with pytest.raises(ValueError, match="1 to 6 out_features"):
        LoraGroup(64, (8,) * 7, (4,) * 7, (1.0,) * 7)
    with pytest.raises(ValueError, match="multiple of 16"):
        LoraGroup(64, (8,), (4,), (1.0,), align=8)
    group = LoraGroup(64, (8,), (4,), (1.0,))
    A, B, b, a = [torch.zeros(4, 64)], [torch.zeros(8, 4)], torch.zeros(8, 64), torch.zeros(64, 64)
    with pytest.raises(ValueError, match=r"A \[4, 64\].*projection 0; got A \(5, 64\)"):
        write_adapters(group, [torch.zeros(5, 64)], B, b, a)
    with pytest.raises(ValueError, match="contiguous"):
        write_adapters(group, A, [torch.zeros(4, 8).T], b, a)
    with pytest.raises(ValueError, match=r"b \[8, 64\]"):
        write_adapters(group, A, B, torch.zeros(8, 16), a)


@pytest.mark.gpu
def test_gpu_fill_is_the_reference_in_bf16() -> None:
    group = LoraGroup(4096, (4096, 1024, 1024), (16, 8, 16), (2.0, 0.3, 1.0))
    A = [torch.randn(r, 4096, device="cuda") for r in group.ranks]
    B = [torch.randn(o, r, device="cuda") for o, r in zip(group.out_features, group.ranks, strict=True)]
    pairs = []
    for write in (lambda *given: AdapterWriteTables([Part(*given)]).run(), write_adapters_reference):
        weight = torch.full((6144 + 64, 4096 + 64), float("nan"), dtype=torch.bfloat16, device="cuda")
        pairs.append((weight[:6144, 4096:], weight[6144:, :4096]))
        write(group, A, B, *pairs[-1])
    assert torch.equal(pairs[0][0], pairs[1][0]) and torch.equal(pairs[0][1], pairs[1][1])


def parts_of_a_layer(device: str) -> list[tuple[Part, Part]]:
    """Four groups as of a decoder layer, one without an adapter, one of a 16-bit shadow; twice, over other memory."""
    made = []
    groups = [
        LoraGroup(72, (40, 24, 24), (4, 0, 8), (2.0, 1.0, 0.5), align=16),
        LoraGroup(40, (72,), (16,), (0.3,), align=16),
        LoraGroup(72, (50, 50), (0, 0), (1.0, 1.0), align=16),
        LoraGroup(50, (72,), (3,), (1.5,), align=16),
    ]
    for i, group in enumerate(groups):
        dtype = torch.float16 if i == 3 else torch.float32
        A = [torch.randn(r, group.in_features, device=device).to(dtype) for r in group.ranks]
        B = [torch.randn(o, r, device=device).to(dtype) for o, r in zip(group.out_features, group.ranks, strict=True)]
        places = []
        for _ in range(2):
            buffer = torch.full((group.out + group.tail, group.in_features + group.tail), float("nan"), device=device)
            places.append((buffer[: group.out, group.in_features :], buffer[group.out :, : group.in_features]))
        made.append(tuple(Part(group, A, B, *place) for place in places))
    return made


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_layer_is_filled_by_one_plan(device: str) -> None:
    """Bit for bit what the groups one by one in PyTorch give, and again when the adapter has changed."""
    pairs = parts_of_a_layer(device)
    plan = AdapterWriteTables([part for part, _ in pairs])
    for _ in range(2):
        plan.launch()
        for part, want in pairs:
            write_adapters_reference(*want)
            assert torch.equal(part.b, want.b) and torch.equal(part.a, want.a)
            for t in (*part.A, *part.B):
                t.mul_(2)
