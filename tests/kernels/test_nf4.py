"""NF4 decode: every comparison is of bits, against bitsandbytes or against the reference that was compared with it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rlft.kernels.nf4 import BLOCKSIZES, DecodeTables, Nf4Weight, decode, decode_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# In the interpreter a cast to bf16 truncates; on a GPU it rounds.
INTERPRETED = (torch.float32, torch.float16)


def quantised(w: Tensor, **settings) -> Tensor:
    """w as bitsandbytes' Params4bit holds it: packed bytes with a quant_state."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Params4bit

    packed, state = quantize_4bit(w, quant_type="nf4", **settings)
    return Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True, blocksize=state.blocksize)


def bnb_decode(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' own dequantize_4bit. As one row: its AVX-512 code on a CPU takes the wrong scales (0.50.2) where a
    block is longer than a row."""
    import copy

    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(weight.quant_state)
    state.dtype, state.shape = dtype, torch.Size([1, weight.quant_state.shape.numel()])
    return dequantize_4bit(weight.data, state).view(weight.quant_state.shape)


def made(
    shape: tuple[int, int], blocksize: int = 64, nested: bool = True, device: str = "cpu", seed: int = 0
) -> Nf4Weight:
    """A random weight, without bitsandbytes: every byte and every 8-bit scale may occur."""
    g = torch.Generator().manual_seed(seed)
    n, blocks = shape[0] * shape[1], -(-shape[0] * shape[1] // blocksize)
    packed = torch.randint(256, ((n + 1) // 2,), dtype=torch.uint8, generator=g).to(device)
    if not nested:
        return Nf4Weight(packed, torch.rand(blocks, generator=g).to(device), shape, blocksize)
    absmax = torch.randint(256, (blocks,), dtype=torch.uint8, generator=g)
    nested_absmax, offset = torch.rand(-(-blocks // 256), generator=g), torch.rand(1, generator=g)
    tables = (t.to(device) for t in (torch.linspace(-1, 1, 256), nested_absmax, offset))
    return Nf4Weight(packed, absmax.to(device), shape, blocksize, *tables)


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Equal bits, so that -0 is not 0."""
    return got.dtype == want.dtype and torch.equal(
        got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8)
    )


# (64, 256): whole blocks, rows of whole blocks. (33, 72): blocks cross rows, the last one is not full. (7, 9): an odd
# number of elements, so half a byte is left over. (3, 4160): a row longer than any block.
@pytest.mark.parametrize("shape", [(64, 256), (33, 72), (7, 9), (3, 4160)])
@pytest.mark.parametrize("nested", [False, True])
def test_reference_has_bitsandbytes_bits(shape, nested) -> None:
    torch.manual_seed(0)
    for blocksize in (32, 64, 256, 1024, 4096):
        weight = quantised(torch.randn(shape) * 0.02, blocksize=blocksize, compress_statistics=nested)
        for dtype in DTYPES:
            assert same_bits(decode_reference(Nf4Weight.from_bnb(weight), dtype), bnb_decode(weight, dtype)), blocksize


def every_byte(device: str = "cpu", special: tuple[float, ...] = (0.0, 1e-40, 1e-8, 65504.0, 3e38)) -> Nf4Weight:
    """All 256 bytes under each of 32 scales, zero, subnormal and huge ones among them."""
    scales = torch.cat([torch.tensor(special), torch.rand(32 - len(special))])
    # A row is a block; eight hold 512 nibbles, 256 bytes.
    packed = torch.arange(256, dtype=torch.uint8).repeat(32)
    return Nf4Weight(packed.to(device), scales.repeat_interleave(8).to(device), (256, 64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_and_scale(dtype) -> None:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    # On a CPU with AVX-512 bitsandbytes flushes bf16 subnormals to zero; on a GPU it does not.
    weight = every_byte(special=(0.0, 1e-8, 3e38)) if dtype == torch.bfloat16 else every_byte()
    state = QuantState(weight.absmax, torch.Size(weight.shape), blocksize=64, quant_type="nf4", dtype=dtype)
    assert same_bits(decode_reference(weight, dtype), dequantize_4bit(weight.packed[:, None], state))


@pytest.mark.parametrize("dtype", INTERPRETED)
def test_kernel_on_every_byte_and_scale(dtype) -> None:
    # numpy warns where fp16 overflows.
    weight = every_byte(special=(0.0, 1e-40, 1e-8, 65504.0))
    out = torch.empty(256, 64, dtype=dtype)
    DecodeTables([weight], [out]).launch()
    assert same_bits(out, decode_reference(weight, dtype))


def test_an_all_zero_block_is_minus_zero() -> None:
    """bitsandbytes' GPU quantiser gives such a block index 0, value -1, and scale 0."""
    weight = Nf4Weight(torch.zeros(64, dtype=torch.uint8), torch.tensor([0.0, 1.0]), (2, 64))
    out = torch.empty(2, 64)
    DecodeTables([weight], [out]).launch()
    assert torch.signbit(out[0]).all() and (out[0] == 0).all() and (out[1] == -1).all()
    assert same_bits(out, decode_reference(weight, torch.float32))


# Programs take 4,096 elements. (2, 8192): they divide a row. (40, 104): they cross rows, rows cross blocks, the last
# one is not full. (5, 20): rows are no multiple of 8, so elements go one by one. (1, 1): one element.
@pytest.mark.parametrize("shape", [(2, 8192), (40, 104), (5, 20), (1, 1)])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("gather", [False, True])
def test_kernel_has_the_reference_bits(shape, nested, gather) -> None:
    for blocksize, dtype in itertools.product((32, 64, 4096), INTERPRETED):
        weight = made(shape, blocksize, nested)
        buffer = torch.full((shape[0], shape[1] + 8), 7.0, dtype=dtype)
        out = buffer[:, : shape[1]]
        DecodeTables([weight], [out], gather=gather).launch()
        assert same_bits(out, decode_reference(weight, dtype)) and (buffer[:, shape[1] :] == 7).all(), (
            blocksize,
            dtype,
        )


def test_matrices_of_a_layer_share_a_launch() -> None:
    """q, k, v side by side in one buffer with a tail behind each row; each has its own offset and scales."""
    weights = [made((n, 96), seed=n) for n in (50, 10, 20)]
    buffer = torch.full((80, 96 + 16), 7.0)
    plan = DecodeTables(weights, buffer[:, :96])
    assert len(plan.launches) == 1
    plan.launch()
    assert same_bits(buffer[:, :96], torch.cat([decode_reference(w, torch.float32) for w in weights]))
    assert (buffer[:, 96:] == 7).all()


def test_unlike_matrices_take_a_launch_each() -> None:
    weights = [made((8, 64)), made((8, 64), nested=False), made((8, 64), 128), made((8, 20)), made((4, 64), seed=1)]
    outs = [torch.empty(w.shape, dtype=torch.float16) for w in weights]
    plan = DecodeTables(weights, outs)
    assert len(plan.launches) == 4
    plan.launch()
    assert all(same_bits(o, decode_reference(w, torch.float16)) for w, o in zip(weights, outs, strict=True))


def test_any_stride_and_address() -> None:
    """Rows at odd addresses are written one by one, and nothing beside them."""
    weight = made((6, 64))
    for columns, start in ((67, 0), (72, 1), (72, 8)):
        buffer = torch.full((6, columns), 7.0)
        out = buffer[:, start : start + 64] if start < 8 else buffer[:, 8:]
        DecodeTables([weight], [out]).launch()
        assert same_bits(out, decode_reference(weight, torch.float32))
        assert int((buffer == 7).sum()) == 6 * (columns - 64)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_the_view_copies_nothing(storage) -> None:
    weight = quantised(torch.randn(32, 64), quant_storage=storage, compress_statistics=True)
    view = Nf4Weight.from_bnb(weight)
    state = weight.quant_state
    assert view.packed.data_ptr() == weight.data_ptr() and view.absmax.data_ptr() == state.absmax.data_ptr()
    assert view.nested_code is not None and view.nested_code.data_ptr() == state.state2.code.data_ptr()
    out = torch.empty(32, 64)
    decode([view], out)
    assert same_bits(out, bnb_decode(weight, torch.float32))


def test_a_linear4bit_of_bitsandbytes() -> None:
    """The way users meet it: a module quantised by moving it, and a checkpoint loaded under a bf16 default dtype."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 32, bias=False, compress_statistics=True, quant_type="nf4").to("cpu")
    with pytest.raises(ValueError, match="quantised Params4bit"):
        Nf4Weight.from_bnb(torch.nn.Linear(4, 4).weight)
    weight = layer.weight
    assert same_bits(decode_reference(Nf4Weight.from_bnb(weight), torch.bfloat16), bnb_decode(weight, torch.bfloat16))
    saved = {k: v.clone() if isinstance(v, Tensor) else v for k, v in weight.quant_state.as_dict(packed=True).items()}
    torch.set_default_dtype(torch.bfloat16)
    try:
        weight.quant_state = QuantState.from_dict(saved, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert weight.quant_state.offset.dtype == torch.bfloat16
    assert same_bits(decode_reference(Nf4Weight.from_bnb(weight), torch.float32), bnb_decode(weight, torch.float32))


def test_bad_input_says_what_it_wants() -> None:
    good = made((8, 64))
    with pytest.raises(ValueError, match="packed uint8"):
        Nf4Weight(good.packed.view(torch.int8), good.absmax, (8, 64), nested_code=good.nested_code)
    with pytest.raises(ValueError, match="8x65 weight in blocks of 64"):
        Nf4Weight(good.packed, torch.rand(8), (8, 65))
    with pytest.raises(ValueError, match="blocks of 48"):
        Nf4Weight(good.packed, torch.rand(8), (8, 64), 48)
    with pytest.raises(ValueError, match="absmax float32"):
        Nf4Weight(good.packed, torch.rand(8).half(), (8, 64))
    with pytest.raises(ValueError, match=r"output \[8, 64\].*got.*\(8, 65\)"):
        decode([good], [torch.empty(8, 65)])
    with pytest.raises(ValueError, match="unit column stride"):
        decode([good], [torch.empty(64, 8).T])
    with pytest.raises(ValueError, match="all of one dtype"):
        decode([good, good], [torch.empty(8, 64), torch.empty(8, 64).half()])
    with pytest.raises(ValueError, match=r"output of 8 \+ 8 rows"):
        decode([good, good], torch.empty(15, 64))
    with pytest.raises(ValueError, match="1 for 2 matrices"):
        decode([good, good], [torch.empty(8, 64)])
    weight = quantised(torch.randn(8, 64))
    weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacks"):
        Nf4Weight.from_bnb(weight)
    weight.quant_state.packing_format_for_cpu, weight.quant_state.quant_type = False, "fp4"
    with pytest.raises(ValueError, match='"nf4", got "fp4"'):
        Nf4Weight.from_bnb(weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gather", [False, True])
def test_gpu_bits(dtype, gather) -> None:
    for shape in ((256, 4096), (40, 104), (129, 2560), (5, 20)):
        for blocksize, nested in itertools.product(BLOCKSIZES, (False, True)):
            weight = made(shape, blocksize, nested, "cuda")
            out = torch.full(shape, 7.0, dtype=dtype, device="cuda")
            DecodeTables([weight], [out], gather=gather).run()
            assert same_bits(out, decode_reference(weight, dtype)), (shape, blocksize, nested)
    weight = every_byte("cuda")
    out = torch.empty(256, 64, dtype=dtype, device="cuda")
    decode([weight], [out])
    assert same_bits(out, decode_reference(weight, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [False, True])
def test_gpu_bits_of_bitsandbytes(nested) -> None:
    """The seven matrices of a Qwen3-8B layer in one launch, each beside its tail of 64 columns."""
    functional = pytest.importorskip("bitsandbytes.functional")
    shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (12288, 4096), (12288, 4096), (4096, 12288)]
    packed = [
        functional.quantize_4bit(torch.randn(s, device="cuda") * 0.02, quant_type="nf4", compress_statistics=nested)
        for s in shapes
    ]
    weights = []
    for data, state in packed:
        data.quant_state = state
        weights.append(Nf4Weight.from_bnb(data))
    for dtype in DTYPES:
        buffers = [torch.full((o, i + 64), 7.0, dtype=dtype, device="cuda") for o, i in shapes]
        plan = DecodeTables(weights, [b[:, :-64] for b in buffers])
        assert len(plan.launches) == 1
        plan.run()
        for (data, state), buffer in zip(packed, buffers, strict=True):
            state.dtype = dtype
            assert torch.equal(buffer[:, :-64], functional.dequantize_4bit(data, state))
            assert (buffer[:, -64:] == 7).all()


@pytest.mark.gpu
def test_gpu_more_than_2_31_elements() -> None:
    shape = (2**19 + 3, 4096)
    packed = torch.randint(256, (shape[0] * 2048,), dtype=torch.uint8, device="cuda")
    weight = Nf4Weight(packed, torch.rand(shape[0] * 64, device="cuda"), shape)
    out = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    decode([weight], [out])
    for start in (0, 2**18, 2**19 - 5):
        part = Nf4Weight(
            packed[start * 2048 : (start + 8) * 2048], weight.absmax[start * 64 : (start + 8) * 64], (8, 4096)
        )
        assert same_bits(out[start : start + 8], decode_reference(part, torch.bfloat16))


@pytest.mark.gpu
def test_gpu_graph_and_side_stream() -> None:
    weights = [made((512, 1024), device="cuda", seed=i) for i in range(3)]
    out = torch.zeros(1536, 1024, dtype=torch.bfloat16, device="cuda")
    want = torch.cat([decode_reference(w, torch.bfloat16) for w in weights])
    plan = DecodeTables(weights, out)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        out.fill_(7)
        plan.run()
    side.synchronize()
    assert same_bits(out, want)
    out.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run()
    assert not out.any()
    graph.replay()
    assert same_bits(out, want)
