"""The shape of a LoRA group, and its adapters written where the matrix products want them.

A group is one to three projections of the same input x [T, H], for example q, k, v. Their A's are stacked to
a [tail, H]; their B's stand in block form in b [out, tail], times scale = alpha / r, zero up to `tail` columns:

    b[rows of i, columns of i] = scale_i B_i,    a[columns of i] = A_i

This is the only place where the scale is applied (`rlft.kernels.low_rank.gradients` takes it back for B's gradient).
A buffer [out + tail, H + tail] that holds W in its upper left has room for b (upper right) and a (lower left).

Bytes: reads A and B, writes (out + H) * tail elements, once per use of a scratch weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from rlft.kernels.launch import jit, on_device, on_gpu, tl, want


@dataclass(frozen=True)
class LoraGroup:
    """One to three projections that read the same input.

    in_features: H. out_features, ranks, scales: per projection; rank 0 is a projection without adapter; scale is
    alpha / r (or alpha / sqrt(r)). align: the tail's width is rounded up to this; 64 keeps rows of 16-bit elements at
    128 bytes. Raises ValueError on lengths and signs that do not fit.
    """

    in_features: int
    out_features: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    align: int = 64

    def __post_init__(self) -> None:
        if not 1 <= len(self.out_features) <= 3 or {len(self.ranks), len(self.scales)} != {len(self.out_features)}:
            raise ValueError(
                f"LoraGroup: want 1 to 3 out_features and as many ranks and scales, got out_features "
                f"{self.out_features}, ranks {self.ranks}, scales {self.scales}"
            )
        if min(self.ranks) < 0 or self.align < 16 or self.align % 16:
            raise ValueError(
                f"LoraGroup: want ranks of at least 0 and align a multiple of 16, got {self.ranks}, {self.align}"
            )

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

    def rows(self, i: int) -> slice:
        """Columns of Y and rows of W that are projection i's."""
        return slice(sum(self.out_features[:i]), sum(self.out_features[: i + 1]))

    def columns(self, i: int) -> slice:
        """Columns of S, dS and the tail that are projection i's."""
        return slice(sum(self.ranks[:i]), sum(self.ranks[: i + 1]))

    @cached_property
    def adapted(self) -> tuple[int, ...]:
        """Projections with an adapter."""
        return tuple(i for i, rank in enumerate(self.ranks) if rank)


def fill_reference(group: LoraGroup, A: Sequence[Tensor], B: Sequence[Tensor], b: Tensor, a: Tensor) -> None:
    """`fill` in plain PyTorch."""
    b.zero_()
    a.zero_()
    for i in group.adapted:
        b[group.rows(i), group.columns(i)] = (
            B[i].to(torch.promote_types(B[i].dtype, torch.float32)) * group.scales[i]
        ).to(b.dtype)
        a[group.columns(i)] = A[i].to(a.dtype)


@jit
def _fill(
    a0, a1, a2, b0, b1, b2, a, a_stride, b, b_stride, scale0, scale1, scale2, H, OUT: tl.constexpr,
    TAIL: tl.constexpr, COUNT: tl.constexpr, COLUMN: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr,
    RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First the OUT x TAIL elements of b, then the TAIL x H of a, BLOCK per program.

    The tuples hold, per projection with an adapter: COLUMN and WIDTH, its first row of b and their number; K and RANK,
    its first column of b and their number.
    """
    programs_b: tl.constexpr = (OUT * TAIL + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    if pid < programs_b:
        e = pid * BLOCK + tl.arange(0, BLOCK)
        row, k = e // TAIL, e % TAIL
        value = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(COUNT):
            source = b0 if i == 0 else (b1 if i == 1 else b2)
            scale = scale0 if i == 0 else (scale1 if i == 1 else scale2)
            inside = (row >= COLUMN[i]) & (row < COLUMN[i] + WIDTH[i]) & (k >= K[i]) & (k < K[i] + RANK[i])
            loaded = tl.load(source + (row - COLUMN[i]) * RANK[i] + (k - K[i]), mask=inside, other=0.0)
            value += loaded.to(tl.float32) * scale
        tl.store(b + row.to(tl.int64) * b_stride + k, value.to(b.dtype.element_ty), mask=row < OUT)
    else:
        e = (pid - programs_b) * BLOCK + tl.arange(0, BLOCK)
        k, c = e // H, e % H
        value = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(COUNT):
            source = a0 if i == 0 else (a1 if i == 1 else a2)
            inside = (k >= K[i]) & (k < K[i] + RANK[i])
            value += tl.load(source + (k - K[i]) * H + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(a + k.to(tl.int64) * a_stride + c, value.to(a.dtype.element_ty), mask=k < TAIL)


def three(items: Sequence) -> list:
    """Padded to three by repeating the last: kernels take as many pointers as a group can have projections."""
    return [items[min(i, len(items) - 1)] for i in range(3)]


def fill_launch(group: LoraGroup, A: Sequence[Tensor], B: Sequence[Tensor], b: Tensor, a: Tensor) -> Callable[[], None]:
    """`filler` by the kernel."""
    on = group.adapted
    block = 1024
    programs = -(-group.out * group.tail // block) + -(-group.tail * group.in_features // block)
    launch = partial(
        _fill[(programs,)],
        *three([A[i] for i in on]), *three([B[i] for i in on]), a, a.stride(0), b, b.stride(0),
        *three([float(group.scales[i]) for i in on]), group.in_features, OUT=group.out, TAIL=group.tail,
        COUNT=len(on), COLUMN=tuple(group.rows(i).start for i in on), K=tuple(group.columns(i).start for i in on),
        WIDTH=tuple(group.out_features[i] for i in on), RANK=tuple(group.ranks[i] for i in on), BLOCK=block,
    )  # fmt: skip

    def run() -> None:
        with on_device(b):
            launch()

    return run


def fill(group: LoraGroup, A: Sequence[Tensor], B: Sequence[Tensor], b: Tensor, a: Tensor) -> None:
    """Write the adapters where the products want them. Arguments and errors as `filler`."""
    filler(group, A, B, b, a)()


def filler(group: LoraGroup, A: Sequence[Tensor], B: Sequence[Tensor], b: Tensor, a: Tensor) -> Callable[[], None]:
    """What writes the adapters where the products want them, as they are when it is called: for tensors that are
    written again and again, whose shapes are looked at here once.

    A: per projection [r_i, H], B: [out_i, r_i], contiguous, of any float dtype (masters or shadow; the product with the
    scale is rounded once). b: [out, tail], a: [tail, H], overwritten, unit column stride. Raises ValueError otherwise.
    """
    for i, rank in enumerate(group.ranks):
        want(
            "fill",
            tuple(A[i].shape) == (rank, group.in_features) and tuple(B[i].shape) == (group.out_features[i], rank)
            and A[i].is_contiguous() and B[i].is_contiguous(),
            f"A [{rank}, {group.in_features}] and B [{group.out_features[i]}, {rank}], contiguous, for projection {i}",
            A=A[i], B=B[i],
        )  # fmt: skip
    want(
        "fill",
        tuple(b.shape) == (group.out, group.tail) and tuple(a.shape) == (group.tail, group.in_features)
        and a.dtype == b.dtype and all(t.stride(1) == 1 or not t.numel() for t in (a, b)),
        f"b [{group.out}, {group.tail}] and a [{group.tail}, {group.in_features}] of one dtype, unit column stride",
        b=b, a=a,
    )  # fmt: skip
    if group.tail and on_gpu("fill", b=b, a=a, **{f"A{i}": A[i] for i in group.adapted}):
        return fill_launch(group, A, B, b, a)
    return partial(fill_reference, group, A, B, b, a)
