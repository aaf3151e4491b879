"""Describe the shape of a LoRA group, and write its adapters in the layout that the matrix products read.

A group is one to six projections of the same input x [T, H], for example q, k, v. Their A's are stacked to a
[tail, H]; their B's form blocks of b [out, tail], times scale = alpha / r, with zeros up to `tail` columns:

    b[rows of i, columns of i] = scale_i B_i,    a[columns of i] = A_i

The scale is applied only here (`rlft.kernels.low_rank.gradients` accounts for it in B's gradient). A buffer
[out + tail, H + tail] that holds W in its upper left has room for b (upper right) and a (lower left).

Bytes: reads A and B, writes (out + H) * tail elements, once per use of a scratch weight; the groups of a decoder layer
take one launch. In the kernel: m a row of the table, e, r, c, k indices of elements, rows, columns, columns of the
source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from rlft.kernels.launch import check_args, element_type, kernel, launch, on_gpu, table_entry, tl
from rlft.upload import upload

MOST = 6
"""Most projections of a group."""
TOGETHER = 3
"""Projections whose gradients one launch adds up."""


@dataclass(frozen=True)
class LoraGroup:
    """One to six projections that read the same input.

    in_features: H. out_features, ranks, scales: per projection; rank 0 is a projection without adapter; scale is
    alpha / r (or alpha / sqrt(r)). align: the width of the tail is rounded up to this; 64 keeps rows of 16-bit elements
    at 128 bytes. Raises ValueError on lengths and signs that do not fit.
    """

    in_features: int
    out_features: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    align: int = 64

    def __post_init__(self) -> None:
        if not 1 <= len(self.out_features) <= MOST or {len(self.ranks), len(self.scales)} != {len(self.out_features)}:
            raise ValueError(
                f"LoraGroup: want 1 to {MOST} out_features and as many ranks and scales, got out_features "
                f"{self.out_features}, ranks {self.ranks}, scales {self.scales}"
            )
        if min(self.ranks) < 0 or self.align < 16 or self.align % 16:
            raise ValueError(
                f"LoraGroup: want ranks of at least 0 and align a multiple of 16, got {self.ranks}, {self.align}"
            )

    def __hash__(self) -> int:
        # Caches by group are read many times per layer; hashing the fields each time takes as long as an operation.
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.in_features, self.out_features, self.ranks, self.scales, self.align))

    @cached_property
    def out(self) -> int:
        """Output columns of the whole group."""
        return sum(self.out_features)

    @cached_property
    def rank(self) -> int:
        """Sum of the ranks."""
        return sum(self.ranks)

    @cached_property
    def tail(self) -> int:
        """Columns behind x and dY, rows below W: the sum of the ranks rounded up; 0 without any adapter."""
        return -(-self.rank // self.align) * self.align

    @cached_property
    def buffer(self) -> tuple[int, int]:
        """Shape of a buffer with room for W, b and a."""
        return self.out + self.tail, self.in_features + self.tail

    def rows(self, i: int) -> slice:
        """Return the columns of Y, and rows of W, of projection i."""
        return slice(sum(self.out_features[:i]), sum(self.out_features[: i + 1]))

    def columns(self, i: int) -> slice:
        """Return the columns of S, dS and the tail of projection i."""
        return slice(sum(self.ranks[:i]), sum(self.ranks[: i + 1]))

    @cached_property
    def adapted(self) -> tuple[int, ...]:
        """Indices of the projections with an adapter."""
        return tuple(i for i, rank in enumerate(self.ranks) if rank)

    @cached_property
    def parts(self) -> tuple[GroupPart, ...]:
        """Parts with at most `TOGETHER` adapters each, as even as possible; together they have all columns of S."""
        adapted, parts = self.adapted, -(-len(self.adapted) // TOGETHER)
        bounds = [len(adapted) * i // parts for i in range(parts + 1)]
        starts = [*(self.columns(adapted[first]).start for first in bounds[:-1]), self.tail]
        result = []
        for (first, last), (start, end) in zip(pairwise(bounds), pairwise(starts), strict=True):
            span = slice(adapted[first], adapted[last - 1] + 1)
            group = LoraGroup(
                self.in_features, self.out_features[span], self.ranks[span], self.scales[span], self.align
            )
            rows = slice(self.rows(span.start).start, self.rows(span.stop - 1).stop)
            result.append(GroupPart(group, span, rows, slice(start, end)))
        return tuple(result)


class GroupPart(NamedTuple):
    """Neighbouring projections of a group."""

    group: LoraGroup
    projections: slice
    rows: slice
    """Their columns of Y, and rows of W."""
    columns: slice
    """Their columns of S, dS and the tail; of the last part up to the end of the tail."""


def write_adapters_reference(group: LoraGroup, A: Sequence[Tensor], B: Sequence[Tensor], b: Tensor, a: Tensor) -> None:
    """Write the adapters into b and a in plain PyTorch."""
    b.zero_()
    a.zero_()
    for i in group.adapted:
        b[group.rows(i), group.columns(i)] = (
            B[i].to(torch.promote_types(B[i].dtype, torch.float32)) * group.scales[i]
        ).to(b.dtype)
        a[group.columns(i)] = A[i].to(a.dtype)


# The table has a row of FIELDS int64 per block to write: 0 source, 1 target (addresses), 2 elements, 3 columns,
# 4 first column that the source fills, 5 columns of the source (0: all zeros), 6 row stride of the target, 7 first
# program.
FIELDS = 8
BLOCK = 1024
"""Elements per program."""


@kernel()
def _fill(
    table,
    scales,
    COUNT: tl.constexpr,
    FIELDS: tl.constexpr,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the blocks of the table times their scales, with zeros beside the columns of the source.

    ALIGNED: addresses are multiples of 16, and all numbers except the first program multiples of 8.
    """
    m, part = table_entry(table, tl.program_id(0), COUNT, FIELDS)
    row = table + m * FIELDS
    source = tl.load(row).to(tl.pointer_type(SOURCE))  # type: ignore[reportArgumentType]
    target = tl.load(row + 1).to(tl.pointer_type(TARGET))  # type: ignore[reportArgumentType]
    size, columns = tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32)
    first, width = tl.load(row + 4).to(tl.int32), tl.load(row + 5).to(tl.int32)
    stride = tl.load(row + 6)
    if ALIGNED:
        source, target = tl.multiple_of(source, 16), tl.multiple_of(target, 16)
        size, columns, first = tl.multiple_of(size, 8), tl.multiple_of(columns, 8), tl.multiple_of(first, 8)
        width, stride = tl.multiple_of(width, 8), tl.multiple_of(stride, 8)
    e = part * BLOCK + tl.arange(0, BLOCK)
    r = (e // columns).to(tl.int64)
    c = e % columns
    k = c - first
    value = tl.load(source + r * width + k, mask=(e < size) & (k >= 0) & (k < width), other=0.0).to(tl.float32)
    value = value * tl.load(scales + m)
    tl.store(target + r * stride + c, value.to(TARGET), mask=e < size)


class Part(NamedTuple):
    """The adapters of a group, and the tensors they are written into."""

    group: LoraGroup
    A: Sequence[Tensor]
    """Per projection [r_i, H], contiguous, of any float dtype."""
    B: Sequence[Tensor]
    """Per projection [out_i, r_i], likewise. The product with the scale is rounded once."""
    b: Tensor
    """[out, tail], overwritten, unit column stride."""
    a: Tensor
    """[tail, H], likewise, of b's dtype."""

    def check(self) -> None:
        """Raise ValueError for shapes, dtypes and strides that do not fit."""
        group, A, B, b, a = self
        for i, rank in enumerate(group.ranks):
            check_args(
                "fill",
                tuple(A[i].shape) == (rank, group.in_features)
                and tuple(B[i].shape) == (group.out_features[i], rank)
                and A[i].is_contiguous()
                and B[i].is_contiguous(),
                f"A [{rank}, {group.in_features}] and B [{group.out_features[i]}, {rank}], contiguous, for projection "
                f"{i}",
                A=A[i],
                B=B[i],
            )
        check_args(
            "fill",
            tuple(b.shape) == (group.out, group.tail)
            and tuple(a.shape) == (group.tail, group.in_features)
            and a.dtype == b.dtype
            and all(tensor.stride(1) == 1 or not tensor.numel() for tensor in (a, b)),
            f"b [{group.out}, {group.tail}] and a [{group.tail}, {group.in_features}] of one dtype, unit column stride",
            b=b,
            a=a,
        )


class AdapterWriteTables:
    """Writes the current values of the adapters of several groups, in one launch if their dtypes are equal.

    The table of addresses is copied to the device once, so that a CUDA graph can capture `run`. This object keeps the
    tensors alive and must be rebuilt if one of them moves. Raises ValueError for parts that do not fit.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = [part for part in parts if part.group.tail]
        for part in parts:
            part.check()
        tensors = {}
        for index, (group, A, B, b, a) in enumerate(self.parts):
            suffix = f" of part {index}" if len(parts) > 1 else ""
            tensors |= {f"b{suffix}": b, f"a{suffix}": a}
            tensors |= {f"{name}{i}{suffix}": side[i] for name, side in (("A", A), ("B", B)) for i in group.adapted}
        self.gpu = bool(self.parts) and on_gpu("fill", **tensors)

    @cached_property
    def _launches(self) -> list[Callable[[], None]]:
        """One launch per pair of source and target dtypes."""
        rows: dict[tuple[torch.dtype, torch.dtype], list[tuple[list[int], float]]] = {}
        for group, A, B, b, a in self.parts:
            default_dtype = A[group.adapted[0]].dtype
            for i, (rank, scale) in enumerate(zip(group.ranks, group.scales, strict=True)):
                target, first = b[group.rows(i)], group.columns(i).start
                source, dtype = (B[i].data_ptr(), B[i].dtype) if rank else (0, default_dtype)
                block = [source, target.data_ptr(), target.numel(), group.tail, first, rank, b.stride(0)]
                rows.setdefault((dtype, b.dtype), []).append((block, float(scale)))
                if rank:
                    target = a[group.columns(i)]
                    block = [A[i].data_ptr(), target.data_ptr(), target.numel(), a.shape[1], 0, a.shape[1], a.stride(0)]
                    rows.setdefault((A[i].dtype, a.dtype), []).append((block, 1.0))
            if group.rank < group.tail:
                target = a[group.rank :]
                block = [0, target.data_ptr(), target.numel(), a.shape[1], 0, 0, a.stride(0)]
                rows.setdefault((default_dtype, a.dtype), []).append((block, 1.0))
        return [self._launch(*dtypes, blocks) for dtypes, blocks in rows.items()]

    def _launch(
        self, source: torch.dtype, target: torch.dtype, blocks: list[tuple[list[int], float]]
    ) -> Callable[[], None]:
        """Prepare the launch for blocks of one pair of dtypes."""
        device = self.parts[0].b.device
        table, programs = [], 0
        for block, _ in blocks:
            table.append([*block, programs])
            programs += -(-block[2] // BLOCK)
        aligned = all(
            number % (16 if field < 2 else 8) == 0 for block, _ in blocks for field, number in enumerate(block)
        )
        scales = torch.tensor([scale for _, scale in blocks], dtype=torch.float32)
        return partial(
            launch,
            _fill,
            (programs,),
            upload(torch.tensor(table, dtype=torch.int64), device),
            upload(scales, device),
            COUNT=len(blocks),
            FIELDS=FIELDS,
            SOURCE=element_type(source),
            TARGET=element_type(target),
            ALIGNED=aligned,
            BLOCK=BLOCK,
        )

    def run(self) -> None:
        """Write the adapters."""
        if self.gpu:
            self.launch()
        else:
            for part in self.parts:
                write_adapters_reference(*part)

    def launch(self) -> None:
        """Launch the kernels on the current stream."""
        for launch_one in self._launches:
            launch_one()


def write_adapters(group: LoraGroup, A: Sequence[Tensor], B: Sequence[Tensor], b: Tensor, a: Tensor) -> None:
    """Write the adapters once, by PyTorch and without a table, for operands that change with every call.

    Arguments as `Part`, errors as `AdapterWriteTables`.
    """
    part = Part(group, A, B, b, a)
    AdapterWriteTables([part])  # for its checks
    write_adapters_reference(*part)


def pad_to_three(items: Sequence) -> list:
    """Pad to `TOGETHER` items by repeating the last: kernels take that many pointers."""
    return [items[min(i, len(items) - 1)] for i in range(TOGETHER)]
