"""Choose the experts of each token from the router's logits, with their weights, and the gradient to the logits.

With l the logits [T, E] of a token, s the scores of its experts, c_j its k choices, in fp32:

    softmax    s = softmax(l),   ranked by l                    Qwen3-MoE, Mixtral, OLMoE, gpt-oss
    sigmoid    s = sigmoid(l),   ranked by s + bias             DeepSeek-V3, GLM-4-MoE
    groups     only experts of the groups_kept best of `groups` groups are ranked; a group has the sum of its two best
    w_j = scale s_{c_j} / S,     S = sum of s_{c_j} if renormalised (with 1e-20 for sigmoid), else 1

    g_{c_j} = scale (dw_j - sum over i of dw_i s_{c_i} / S) / S if renormalised, else scale dw_j; 0 elsewhere
    dl = s (g - <g, s>) for softmax,   dl = g s (1 - s) for sigmoid

A renormalised softmax is the softmax of the chosen logits, as gpt-oss has it. Of equal experts the first is taken.
Ranking has no gradient, and so neither has bias. A logit that is NaN is chosen, so that its weight is NaN. Choices may
also be given, as where those of the engine are replayed; weights then come from the logits as they are now. Bytes:
reads the logits once each way, writes 8 per choice forward, and the gradient. In the code x are logits, e indexes
experts and j choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlft.kernels.launch import KERNEL_DTYPES, check_args, jit, kernel, launch, on_gpu, power_of_2, tl
from rlft.kernels.route import MOST_EXPERTS

ELEMENTS = 1024
"""Logits of a program, at least one row."""


@dataclass(frozen=True)
class Scoring:
    """How a router scores experts. Raises ValueError for groups without sigmoid and numbers that do not fit."""

    kind: Literal["softmax", "sigmoid"] = "softmax"
    renormalised: bool = True
    """transformers' norm_topk_prob."""
    scale: float = 1.0
    """transformers' routed_scaling_factor."""
    groups: int = 1
    """transformers' n_group; a power of two, as the experts of a group."""
    groups_kept: int = 1
    """transformers' topk_group."""

    def __post_init__(self) -> None:
        ok = self.kind in ("softmax", "sigmoid") and 1 <= self.groups_kept <= self.groups == power_of_2(self.groups)
        if not ok or (self.groups > 1 and self.kind == "softmax"):
            raise ValueError(
                f'Scoring: want kind "softmax", or "sigmoid" with groups, a power of two, of which 1 or more are kept, '
                f"got {self}"
            )


class Choice(NamedTuple):
    """The experts of each token, best first, and their weights."""

    experts: Tensor
    """[T, k] int32."""
    weights: Tensor
    """[T, k] float32 (float64 of float64 logits on a CPU), with a gradient to the logits."""


def choose_reference(
    logits: Tensor, k: int, scoring: Scoring, bias: Tensor | None = None, given: Tensor | None = None
) -> Choice:
    """Compute `choose_experts` in plain PyTorch; differentiable."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    sigmoid = scoring.kind == "sigmoid"
    scores = wide.sigmoid() if sigmoid else wide.softmax(dim=1)
    chosen = given
    if chosen is None:
        ranked = (scores if bias is None else scores + bias) if sigmoid else wide
        ranked = ranked.detach().nan_to_num(float("inf"), float("inf"), float("-inf"))
        if scoring.groups > 1:
            groups = ranked.unflatten(1, (scoring.groups, -1))
            best = groups.topk(2, dim=2).values.sum(dim=2).sort(dim=1, descending=True, stable=True).indices
            kept = torch.zeros_like(best, dtype=torch.bool).scatter(1, best[:, : scoring.groups_kept], True)
            ranked = groups.masked_fill(~kept[:, :, None], float("-inf")).view_as(ranked)
        chosen = ranked.sort(dim=1, descending=True, stable=True).indices[:, :k].int()
    weights = scores.gather(1, chosen.long())
    if scoring.renormalised:
        weights = weights / (weights.sum(dim=1, keepdim=True) + (1e-20 if sigmoid else 0.0))
    return Choice(chosen, weights * scoring.scale)


@jit
def _best(ranked, open_to, lane, LANES: tl.constexpr):
    """Return the first lane [ROWS] of those open that ranks highest."""
    top = tl.max(tl.where(open_to, ranked, float("-inf")), axis=1)
    return tl.min(tl.where(open_to & (ranked == top[:, None]), lane[None, :], LANES - 1), axis=1)


@jit
def _kept(ranked, ROWS: tl.constexpr, BINS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr):
    """Return [ROWS, BINS], whether each expert is in one of the best groups."""
    SIZE: tl.constexpr = BINS // GROUPS
    inside, group = tl.arange(0, SIZE)[None, None, :], tl.arange(0, GROUPS)
    members = tl.reshape(ranked, [ROWS, GROUPS, SIZE])
    best = tl.max(members, axis=2)
    first = tl.min(tl.where(members == best[:, :, None], inside, SIZE), axis=2)
    total = best + tl.max(tl.where(inside == first[:, :, None], float("-inf"), members), axis=2)
    closed = tl.zeros([ROWS, GROUPS], tl.int32)
    for _ in tl.static_range(KEPT):
        closed += (group[None, :] == _best(total, closed == 0, group, GROUPS)[:, None]).to(tl.int32)
    return tl.reshape(tl.broadcast_to(closed[:, :, None], [ROWS, GROUPS, SIZE]), [ROWS, BINS]) > 0


@jit
def _scores(x, SIGMOID: tl.constexpr):
    """Compute the scores of logits [ROWS, BINS], of which those without an expert are -inf."""
    if SIGMOID:
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        shifted = tl.exp(x - tl.max(x, axis=1)[:, None])
        return shifted / tl.sum(shifted, axis=1)[:, None]


@kernel(varying=("T",))
def _choose(
    logits,
    bias,
    given,
    experts,
    weights,
    T,
    stride,
    scale,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    CHOICES: tl.constexpr,
    WIDTH: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISED: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Choose the experts of ROWS tokens, or read them from `given`, and write their weights."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e, lane = tl.arange(0, BINS), tl.arange(0, WIDTH)
    real = tl.broadcast_to((e < EXPERTS)[None, :], [ROWS, BINS])
    x = tl.load(logits + rows[:, None] * stride + e[None, :], mask=(rows < T)[:, None] & real, other=0.0).to(tl.float32)
    x = tl.where(real, x, float("-inf"))
    score = _scores(x, SIGMOID)
    ranked = x
    if SIGMOID:
        ranked = score
        if bias is not None:
            ranked += tl.load(bias + e, mask=e < EXPERTS, other=0.0)[None, :]
    ranked = tl.where(ranked == ranked, ranked, float("inf"))
    open_to = real
    if GROUPS > 1:
        open_to = _kept(ranked, ROWS, BINS, GROUPS, KEPT)
    chosen = tl.zeros([ROWS, WIDTH], tl.float32)
    for j in tl.static_range(CHOICES):
        place = rows * CHOICES + j
        if given is not None:
            expert = tl.load(given + place, mask=rows < T, other=0).to(tl.int32)
        else:
            expert = _best(ranked, open_to, e, EXPERTS)
            open_to = open_to & (e[None, :] != expert[:, None])
        tl.store(experts + place, expert, mask=rows < T)
        one = tl.sum(tl.where(e[None, :] == expert[:, None], score, 0.0), axis=1)
        chosen = tl.where(lane[None, :] == j, one[:, None], chosen)
    if RENORMALISED:
        total = tl.sum(chosen, axis=1)
        if SIGMOID:
            total += 1e-20
        chosen = chosen / total[:, None]
    live = (rows < T)[:, None] & (lane < CHOICES)[None, :]
    tl.store(weights + rows[:, None] * CHOICES + lane[None, :], chosen * scale, mask=live)


@kernel(varying=("T",))
def _choose_backward(
    logits,
    experts,
    dweights,
    dlogits,
    T,
    stride,
    scale,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    CHOICES: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute the gradient to the logits of ROWS tokens."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BINS)
    live = (rows < T)[:, None] & (e < EXPERTS)[None, :]
    x = tl.load(logits + rows[:, None] * stride + e[None, :], mask=live, other=0.0).to(tl.float32)
    score = _scores(tl.where((e < EXPERTS)[None, :], x, float("-inf")), SIGMOID)
    g, mine = tl.zeros([ROWS, BINS], tl.float32), tl.zeros([ROWS, BINS], tl.int32)
    for j in tl.static_range(CHOICES):
        place = rows * CHOICES + j
        here = e[None, :] == tl.load(experts + place, mask=rows < T, other=0)[:, None]
        g += tl.where(here, tl.load(dweights + place, mask=rows < T, other=0.0)[:, None], 0.0)
        mine += here.to(tl.int32)
    if RENORMALISED:
        total = tl.sum(tl.where(mine > 0, score, 0.0), axis=1)[:, None]
        if SIGMOID:
            total += 1e-20
        mean = tl.sum(g * score, axis=1)[:, None] / total
        g = tl.where(mine > 0, (g - mean) / total, 0.0)
    g = score * (g * (1.0 - score) if SIGMOID else g - tl.sum(g * score, axis=1)[:, None])
    place = dlogits + rows[:, None] * EXPERTS + e[None, :]
    tl.store(place, (g * scale).to(dlogits.dtype.element_ty), mask=live)


def _sizes(experts: int, k: int, scoring: Scoring) -> tuple[int, dict[str, int | bool]]:
    """Return rows per program, and constants of both kernels."""
    lanes = power_of_2(experts)
    rows = max(1, ELEMENTS // lanes)
    sizes = {"EXPERTS": experts, "BINS": lanes, "CHOICES": k, "ROWS": rows, "SIGMOID": scoring.kind == "sigmoid"}
    return rows, sizes | {"RENORMALISED": scoring.renormalised}


def choose_launch(
    logits: Tensor, k: int, scoring: Scoring, bias: Tensor | None = None, given: Tensor | None = None
) -> Choice:
    """Compute `choose_experts` by the kernel, without a gradient."""
    T, experts = logits.shape
    chosen = torch.empty(T, k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(T, k, dtype=torch.float32, device=logits.device)
    rows, sizes = _sizes(experts, k, scoring)
    groups = {"GROUPS": scoring.groups, "KEPT": scoring.groups_kept, "WIDTH": power_of_2(k)}
    if T:
        arguments = logits, bias, given, chosen, weights, T, logits.stride(0), float(scoring.scale)
        launch(_choose, (-(-T // rows),), *arguments, **sizes, **groups, num_warps=4)
    return Choice(chosen, weights)


def choose_backward_launch(logits: Tensor, experts: Tensor, dweights: Tensor, scoring: Scoring) -> Tensor:
    """Compute the gradient [T, E] to the logits, from that of the weights [T, k] fp32, contiguous."""
    T, lanes = logits.shape
    dlogits = torch.empty(T, lanes, dtype=logits.dtype, device=logits.device)
    rows, sizes = _sizes(lanes, experts.shape[1], scoring)
    if T:
        arguments = logits, experts, dweights, dlogits, T, logits.stride(0), float(scoring.scale)
        launch(_choose_backward, (-(-T // rows),), *arguments, **sizes, num_warps=4)
    return dlogits


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, k, scoring, bias, given):  # type: ignore[override]
        choice = choose_launch(logits, k, scoring, bias, given)
        ctx.save_for_backward(logits, choice.experts)
        ctx.scoring = scoring
        ctx.mark_non_differentiable(choice.experts)
        return tuple(choice)

    @staticmethod
    @once_differentiable
    def backward(ctx, _, dweights):  # type: ignore[override]
        logits, experts = ctx.saved_tensors
        return choose_backward_launch(logits, experts, dweights.contiguous(), ctx.scoring), None, None, None, None


def choose_experts(
    logits: Tensor, k: int, scoring: Scoring, bias: Tensor | None = None, given: Tensor | None = None
) -> Choice:
    """Choose k experts per token, with weights that have a gradient to the logits.

    logits: [T, E] of a float dtype, rows of any stride. bias: [E] float32, added for ranking only, sigmoid only. given:
    [T, k] int32 choices to take in place of the best, contiguous, in [0, E) and without repetition in a row, which is
    the caller's to guarantee. Raises ValueError on shapes, dtypes and groups that do not fit.
    """
    experts = logits.shape[-1]
    size = experts // scoring.groups
    check_args(
        "choose_experts",
        logits.dim() == 2
        and 1 <= k <= size * scoring.groups_kept
        and experts <= MOST_EXPERTS
        and (logits.stride(1) == 1 or experts == 1)
        and (bias is None or (scoring.kind == "sigmoid" and tuple(bias.shape) == (experts,) and bias.is_contiguous()))
        and (given is None or (tuple(given.shape) == (logits.shape[0], k) and given.dtype == torch.int32))
        and (given is None or given.is_contiguous())
        and (scoring.groups == 1 or (experts == power_of_2(experts) and size >= 2)),
        f"logits [T, E] of at most {MOST_EXPERTS} experts, k={k} of those of kept groups, bias [E] with sigmoid, "
        f"given [T, {k}] int32, with groups a power of two of experts; {scoring}",
        logits=logits,
        bias=bias,
        given=given,
    )
    if not on_gpu("choose_experts", logits=logits, bias=bias, given=given):
        return choose_reference(logits, k, scoring, bias, given)
    check_args(
        "choose_experts",
        logits.dtype in KERNEL_DTYPES and (bias is None or bias.dtype == torch.float32),
        "float32, bfloat16 or float16 logits and a float32 bias on a GPU",
        logits=logits,
        bias=bias,
    )
    return Choice(*_Choose.apply(logits, k, scoring, bias, given))  # type: ignore[misc]
