"""Decode NF4 weights as bitsandbytes stores them to bf16, fp16 or fp32: several matrices in one launch.

A weight W [out, in] is flattened row by row and cut into blocks of 64 (32 to 4,096) elements, regardless of row ends.
Byte j holds element 2j in its high nibble and 2j+1 in its low one; a nibble is an index into 16 values of [-1, 1].

    w_e = round(code[nibble_e] * s_b),   b = e // blocksize
    s_b = absmax_b                                               plain
    s_b = (nested_code[absmax_b] * nested_absmax_(b // 256)) + offset        nested: absmax is itself 8-bit

The nested scale is rounded after the product and again after the sum, as in bitsandbytes' two kernels, so no fused
multiply-add is used: results are bitwise equal to bitsandbytes' dequantize_4bit. An all-zero block decodes to -0.

There is no backward, since the base is frozen. Source: bitsandbytes 0.50.2, functional.py and csrc. Bytes per element:
reads 0.5 + 1/64 + 4/16384, writes 2 (bf16). In the kernels: m the index of a matrix, q a quantized absmax, r a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from rlft.kernels.launch import check_args, element_type, jit, kernel, launch, on_gpu, table_entry, tl
from rlft.upload import upload

NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 16 values. Like bitsandbytes, which has them compiled in, this file ignores a checkpoint's quant_map."""

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FIELDS = 10
"""int64 per matrix in a table; the comment above `_scales` lists them."""

TILE, WARPS, GATHER = 1024, 1, True
"""Elements and warps per program; whether the 16 values are looked up by tl.gather (within a warp's registers) or by
loads. The fastest of a sweep on an H100: 2,535 GB/s for a Qwen3-8B layer, against 1,130 with 4,096 and 4."""


@dataclass(frozen=True, eq=False)
class Nf4Weight:
    """A view of a quantized matrix, or of a stack of them; the tensors are those of bitsandbytes, nothing is copied.

    packed: uint8 [ceil(elements / 2)]. absmax: per block, float32, or uint8 if nested. shape: (out, in), or (experts,
    out, in), with the blocks of the matrix [experts * out, in]. nested_code: float32 [256], nested_absmax: float32
    [ceil(blocks / nested_blocksize)], offset: float32 scalar; all three or none.
    Raises ValueError on sizes and dtypes that do not fit.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    blocksize: int = 64
    nested_code: Tensor | None = None
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None
    nested_blocksize: int = 256

    def __post_init__(self) -> None:
        blocks = -(-self.numel // self.blocksize) if self.blocksize in BLOCKSIZES else -1
        nested = self.nested_code is not None
        ok = (
            self.packed.dtype == torch.uint8
            and self.packed.is_contiguous()
            and self.packed.numel() >= (self.numel + 1) // 2
            and self.absmax.dtype == (torch.uint8 if nested else torch.float32)
            and self.absmax.is_contiguous()
            and self.absmax.numel() == blocks
        )
        if self.nested_code is not None and self.nested_absmax is not None and self.offset is not None:
            tensors = (self.nested_code, self.nested_absmax, self.offset)
            sizes = (256, -(-blocks // self.nested_blocksize), 1)
            ok = ok and all(
                tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.numel() == size
                for tensor, size in zip(tensors, sizes, strict=True)
            )
        else:
            ok = ok and not nested and self.nested_absmax is None and self.offset is None
        check_args(
            "Nf4Weight",
            ok,
            f"the packed bytes and scales of a {'x'.join(map(str, self.shape))} weight in blocks of {self.blocksize} "
            f"(one of {BLOCKSIZES}), contiguous: packed uint8, absmax float32 or, nested, uint8 with float32 tables",
            packed=self.packed,
            absmax=self.absmax,
            nested_code=self.nested_code,
            nested_absmax=self.nested_absmax,
            offset=self.offset,
        )

    @property
    def numel(self) -> int:
        """Number of decoded elements."""
        return torch.Size(self.shape).numel()

    @classmethod
    def from_bnb(cls, weight: Any) -> Nf4Weight:
        """View a bitsandbytes Params4bit (the `weight` of a Linear4bit, a stack of experts) of any quant_storage.

        Raises ValueError if it is not quantized yet, is not NF4, or has bitsandbytes' repacked CPU layout.
        """
        state = getattr(weight, "quant_state", None)
        if state is None:
            raise ValueError(
                f"Nf4Weight.from_bnb: want a quantised Params4bit, got {type(weight).__name__} {tuple(weight.shape)} "
                f"without a quant_state; bitsandbytes quantises when the module moves to its device"
            )
        if state.quant_type != "nf4":
            raise ValueError(f'Nf4Weight.from_bnb: want quant_type "nf4", got "{state.quant_type}"')
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "Nf4Weight.from_bnb: want bitsandbytes' ordinary layout, got the one it repacks to for inference on a "
                "CPU; take the view before the module runs in eval mode"
            )
        if len(state.shape) not in (2, 3):
            raise ValueError(f"Nf4Weight.from_bnb: want a matrix or a stack of them, got shape {tuple(state.shape)}")
        plain = weight.detach().as_subclass(Tensor)
        nested = state.state2 if state.nested else None
        return cls(
            packed=plain.view(torch.uint8).reshape(-1),
            absmax=state.absmax.reshape(-1),
            shape=tuple(state.shape),
            blocksize=state.blocksize,
            nested_code=nested.code if nested else None,
            nested_absmax=nested.absmax.reshape(-1) if nested else None,
            # Under torch.set_default_dtype(bfloat16) a checkpoint's offset is loaded as bf16; bitsandbytes uses that.
            offset=state.offset.float().reshape(1) if nested else None,
            nested_blocksize=nested.blocksize if nested else 256,
        )


def scales_reference(weight: Nf4Weight) -> Tensor:
    """Compute s_b of this file, float32 [blocks]."""
    if weight.nested_code is None or weight.nested_absmax is None or weight.offset is None:
        return weight.absmax
    nested = weight.nested_absmax.repeat_interleave(weight.nested_blocksize)[: weight.absmax.numel()]
    return weight.nested_code[weight.absmax.int()] * nested + weight.offset


def decode_reference(weight: Nf4Weight, dtype: torch.dtype) -> Tensor:
    """Compute the formula of this file: `weight.shape` in `dtype`, bitwise equal to bitsandbytes' dequantize_4bit."""
    pairs = torch.tensor([[NF4_CODE[b >> 4], NF4_CODE[b & 15]] for b in range(256)], device=weight.packed.device)
    values = torch.nn.functional.embedding(weight.packed.int(), pairs).reshape(-1)[: weight.numel]
    scales = scales_reference(weight)
    if weight.numel % weight.blocksize:
        values = values * scales.repeat_interleave(weight.blocksize)[: weight.numel]
    else:
        values = values.view(-1, weight.blocksize).mul_(scales[:, None])
    return values.to(dtype).view(weight.shape)


# The table has a row of FIELDS int64 per matrix: 0 packed, 1 absmax, 2 nested_code, 3 nested_absmax, 4 offset, 5 out
# (addresses), 6 elements, 7 in-features, 8 row stride of out, 9 first program.


@jit
def _scales(row, block, live, NESTED: tl.constexpr):
    """Load s_b of the blocks. NESTED: the nested block size, 0 for plain."""
    absmax = tl.load(row + 1)
    if NESTED:
        q = tl.load(absmax.to(tl.pointer_type(tl.uint8)) + block, mask=live, other=0).to(tl.int32)
        code = tl.load(tl.load(row + 2).to(tl.pointer_type(tl.float32)) + q)
        scale = tl.load(tl.load(row + 3).to(tl.pointer_type(tl.float32)) + block // NESTED, mask=live, other=0.0)
        return code * scale + tl.load(tl.load(row + 4).to(tl.pointer_type(tl.float32)))
    else:
        return tl.load(absmax.to(tl.pointer_type(tl.float32)) + block, mask=live, other=0.0)


@kernel()
def _decode_words(
    table,
    code,
    COUNT: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    TILE: tl.constexpr,
    ONE_ROW: tl.constexpr,
    GATHER: tl.constexpr,
    OUT: tl.constexpr,
):
    """Decode TILE elements, packed by eight into 32-bit integers; a thread loads four of these and stores 16 bytes at
    once.

    In-features and row stride are multiples of 8, addresses of 16. ONE_ROW: TILE divides every in-features.
    """
    m, tile = table_entry(table, tl.program_id(0), COUNT, FIELDS)
    row = table + m * FIELDS
    packed = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.int32)), 16)
    out = tl.multiple_of(tl.load(row + 5).to(tl.pointer_type(OUT)), 16)  # type: ignore[reportArgumentType]
    size = tl.load(row + 6)
    columns = tl.multiple_of(tl.load(row + 7).to(tl.int32), 8)
    stride = tl.multiple_of(tl.load(row + 8), 8)

    NB: tl.constexpr = TILE // BLOCK
    WORDS: tl.constexpr = BLOCK // 8
    start = tile.to(tl.int64) * TILE
    block = tile.to(tl.int64) * NB + tl.arange(0, NB)
    word = tl.arange(0, NB)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    lane = tl.arange(0, 8)
    source = packed + tile.to(tl.int64) * (TILE // 8) + word
    if ONE_ROW:
        per_row = (columns // TILE).to(tl.uint32)
        r = tile.to(tl.uint32) // per_row
        place = r.to(tl.int64) * stride + ((tile.to(tl.uint32) - r * per_row) * TILE).to(tl.int64) + word * 8
        live = block >= 0
        words = tl.load(source, eviction_policy="evict_first")
    else:
        r = start // columns
        column = (start - r * columns).to(tl.int32) + word * 8
        place = (r + column // columns) * stride + column % columns
        live = block * BLOCK < size
        words = tl.load(source, mask=start + word * 8 < size, other=0, eviction_policy="evict_first")

    # Little-endian: element 2j, the high nibble of byte j, is at bit 8j + 4 of the word, element 2j + 1 at bit 8j.
    index = (words[:, :, None] >> ((lane ^ 1) * 4)[None, None, :]) & 15
    if GATHER:
        table16 = tl.load(code + tl.arange(0, 16))
        value = tl.reshape(tl.gather(table16, tl.reshape(index, [TILE]), 0), [NB, WORDS, 8])
    else:
        value = tl.load(code + index)
    value = (value * _scales(row, block, live, NESTED)[:, None, None]).to(OUT)
    target = out + place[:, :, None] + lane[None, None, :]
    if ONE_ROW:
        tl.store(target, value)
    else:
        tl.store(target, value, mask=(start + word * 8 < size)[:, :, None] & (lane >= 0)[None, None, :])


@kernel()
def _decode_elements(
    table,
    code,
    COUNT: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    TILE: tl.constexpr,
    OUT: tl.constexpr,
):
    """Decode TILE elements one by one: any in-features, stride and alignment, at a fraction of the speed."""
    m, tile = table_entry(table, tl.program_id(0), COUNT, FIELDS)
    row = table + m * FIELDS
    packed = tl.load(row).to(tl.pointer_type(tl.uint8))
    out = tl.load(row + 5).to(tl.pointer_type(OUT))  # type: ignore[reportArgumentType]
    columns = tl.load(row + 7)
    element = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    live = element < tl.load(row + 6)
    byte = tl.load(packed + element // 2, mask=live, other=0).to(tl.int32)
    index = tl.where(element % 2 == 0, byte >> 4, byte & 15)
    value = (tl.load(code + index) * _scales(row, element // BLOCK, live, NESTED)).to(OUT)
    tl.store(out + (element // columns) * tl.load(row + 8) + element % columns, value, mask=live)


class DecodeTables:
    """The matrices to decode, their outputs, and the table of addresses that the kernel reads.

    weights: the matrices. outs: for each a [out, in] tensor, bf16, fp16 or fp32, all of one dtype, rows of any stride;
    or one [sum of out, in] tensor that they fill from top to bottom. Build this object once per set of buffers (it
    copies a table to the device) and `run` it as often as needed: that copies nothing, so a CUDA graph can capture it.
    The object keeps the tensors alive and must be rebuilt if one of them moves. Matrices of one block size, all nested
    or all plain, with in-features and strides that are multiples of 8, share a launch: the seven of a decoder layer
    take one. Raises ValueError on shapes, dtypes or devices that do not fit.
    """

    def __init__(
        self,
        weights: Sequence[Nf4Weight],
        outs: Tensor | Sequence[Tensor],
        tile: int = TILE,
        warps: int = WARPS,
        gather: bool = GATHER,
    ) -> None:
        if isinstance(outs, Tensor):
            rows = [weight.shape[0] for weight in weights]
            check_args(
                "decode", sum(rows) == outs.shape[0], f"an output of {' + '.join(map(str, rows))} rows", out=outs
            )
            outs = outs.split(rows)
        if len(weights) != len(outs) or not weights:
            raise ValueError(f"decode: want an output for each matrix, got {len(outs)} for {len(weights)} matrices")
        for weight, out in zip(weights, outs, strict=True):
            check_args(
                "decode",
                out.dim() == 2
                and tuple(out.shape) == weight.shape
                and out.dtype in DTYPES
                and out.dtype == outs[0].dtype
                and (out.stride(1) == 1 or out.shape[1] == 1),
                f"an output {list(weight.shape)} with unit column stride, bf16, fp16 or fp32, all of one dtype",
                out=out,
                first=outs[0],
            )
        self.weights, self.outs = tuple(weights), tuple(outs)
        self.gpu = on_gpu("decode", **{f"weight {i}": weight.packed for i, weight in enumerate(weights)}, out=outs[0])
        self.tile, self.warps, self.gather = tile, warps, gather
        device = outs[0].device
        self.code = upload(torch.tensor(NF4_CODE, dtype=torch.float32), device)
        if self.gpu:
            _ = self.launches  # copies the tables now, since a graph may capture the first run

    def _in_words(self, i: int) -> bool:
        """Return whether `_decode_words` supports matrix i."""
        out, packed = self.outs[i], self.weights[i].packed
        aligned = packed.data_ptr() % 16 == 0 and out.data_ptr() % 16 == 0
        return aligned and out.shape[1] % 8 == 0 and out.stride(0) % 8 == 0

    @cached_property
    def launches(self) -> list[Callable[[], None]]:
        """One launch per kind of matrix."""
        groups: dict[tuple[int, int, bool], list[int]] = {}
        for i, weight in enumerate(self.weights):
            nested = weight.nested_blocksize if weight.nested_code is not None else 0
            if weight.numel:
                groups.setdefault((weight.blocksize, nested, self._in_words(i)), []).append(i)
        return [self._launch(*kind, members) for kind, members in groups.items()]

    def _launch(self, blocksize: int, nested: int, words: bool, members: list[int]) -> Callable[[], None]:
        """Prepare the launch for matrices of one kind."""
        # Without words, a thread has registers for 8 elements.
        tile = max(self.tile, blocksize) if words else 1024
        rows, programs = [], 0
        for i in members:
            weight, out = self.weights[i], self.outs[i]
            scales = [
                tensor.data_ptr() if tensor is not None else 0
                for tensor in (weight.nested_code, weight.nested_absmax, weight.offset)
            ]
            rows.append(
                [
                    weight.packed.data_ptr(),
                    weight.absmax.data_ptr(),
                    *scales,
                    out.data_ptr(),
                    weight.numel,
                    weight.shape[1],
                    out.stride(0),
                    programs,
                ]
            )
            programs += -(-weight.numel // tile)
        options: dict[str, Any] = {}
        if words:
            one_row = all(self.weights[i].shape[1] % tile == 0 for i in members)
            options = {"ONE_ROW": one_row, "GATHER": self.gather}
        # enable_fp_fusion=False: a fused multiply-add in the nested scale would round once instead of twice.
        return partial(
            launch,
            _decode_words if words else _decode_elements,
            (programs,),
            upload(torch.tensor(rows, dtype=torch.int64), self.code.device),
            self.code,
            COUNT=len(members),
            FIELDS=FIELDS,
            BLOCK=blocksize,
            NESTED=nested,
            TILE=tile,
            OUT=element_type(self.outs[0].dtype),
            num_warps=self.warps,
            enable_fp_fusion=False,
            **options,
        )

    def run(self) -> None:
        """Decode all matrices into their outputs."""
        if self.gpu:
            self.launch()
        else:
            for weight, out in zip(self.weights, self.outs, strict=True):
                out.copy_(decode_reference(weight, out.dtype))

    def launch(self) -> None:
        """Launch the Triton kernels on the current stream."""
        for launch_one in self.launches:
            launch_one()


def decode(weights: Sequence[Nf4Weight], outs: Tensor | Sequence[Tensor]) -> None:
    """Decode matrices into `outs` once. Arguments and errors as `DecodeTables`, which callers that repeat it keep."""
    DecodeTables(weights, outs).run()
