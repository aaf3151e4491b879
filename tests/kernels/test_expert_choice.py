"""Choices of experts: those of transformers' routers, the accuracy rule of weights and gradients, replay, refusals."""

from __future__ import annotations

import pytest
import torch
from kernel_rule import DEVICE, DTYPES, QUIET, assert_rule, assert_survives_stream_and_graph
from torch import Tensor

from rlft.kernels.expert_choice import Scoring, choose_backward_launch, choose_experts, choose_launch, choose_reference

pytestmark = QUIET

SCORINGS = [
    Scoring(),
    Scoring(renormalised=False),
    Scoring("sigmoid", scale=2.5),
    Scoring("sigmoid", renormalised=False),
    Scoring("sigmoid", scale=2.5, groups=4, groups_kept=2),
]
# No token; one expert; all of them chosen; more tokens than a program has, E no power of two; the usual.
SHAPES = [(0, 8, 2), (2, 1, 1), (5, 4, 4), (20, 60, 4), (9, 128, 8)]
CASES = [(*shape, scoring) for scoring in SCORINGS for shape in SHAPES if scoring.groups == 1 or shape[1] in (8, 128)]


def drawn(T: int, E: int, dtype: torch.dtype, device: str = DEVICE) -> tuple[Tensor, Tensor]:
    """Logits that differ in fp16 too, and a bias."""
    g = torch.Generator().manual_seed(T + E)
    logits = torch.stack([torch.randperm(E, generator=g) for _ in range(T)]) if T else torch.empty(0, E)
    return ((logits - E / 2) / max(8, E / 8)).to(device, dtype), (torch.randn(E, generator=g) * 0.1).to(device)


def gradient(logits: Tensor, given: Tensor, dweights: Tensor, scoring: Scoring, dtype: torch.dtype) -> Tensor:
    """By autograd of the plain version, with the choices given."""
    leaf = logits.to(dtype).requires_grad_()
    weights = choose_reference(leaf, given.shape[1], scoring, given=given).weights
    (found,) = torch.autograd.grad(weights, leaf, dweights.to(weights.dtype))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, E, k, scoring", CASES)
def test_the_kernels_obey_the_rule(T: int, E: int, k: int, scoring: Scoring, dtype: torch.dtype) -> None:
    logits, bias = drawn(T, E, dtype)
    bias = bias if scoring.kind == "sigmoid" else None
    got, plain = choose_launch(logits, k, scoring, bias), choose_reference(logits, k, scoring, bias)
    assert torch.equal(got.experts, plain.experts)
    truth = choose_reference(logits.double(), k, scoring, given=got.experts).weights
    assert_rule("weights", got.weights, plain.weights, truth, 2)
    forced = got.experts.flip(1).contiguous()
    again = choose_launch(logits, k, scoring, bias, forced)
    assert torch.equal(again.experts, forced)
    assert_rule("forced", again.weights, plain.weights.flip(1), truth.flip(1), 2)
    dweights = torch.randn(T, k, device=DEVICE)
    d = choose_backward_launch(logits, got.experts, dweights, scoring)
    plain_d, true_d = (gradient(logits, got.experts, dweights, scoring, t) for t in (dtype, torch.float64))
    assert_rule("dlogits", d, plain_d, true_d, 3)


@pytest.mark.parametrize("scoring", SCORINGS, ids=str)
def test_the_plain_version_has_its_gradient(scoring: Scoring) -> None:
    logits, bias = drawn(3, 8, torch.float64, "cpu")
    bias = bias.double() if scoring.kind == "sigmoid" else None
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: choose_experts(x, 2, scoring, bias).weights, logits)


def test_it_is_transformers_qwen3_and_glm4_router() -> None:
    from transformers import Glm4MoeConfig, Qwen3MoeConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    torch.manual_seed(0)
    x = torch.randn(40, 16)
    for norm in (True, False):
        router = Qwen3MoeTopKRouter(
            Qwen3MoeConfig(hidden_size=16, num_experts=12, num_experts_per_tok=3, norm_topk_prob=norm)
        )
        torch.nn.init.normal_(router.weight)
        logits, weights, experts = router(x)
        ours = choose_experts(logits, 3, Scoring(renormalised=norm))
        assert torch.equal(ours.experts.long(), experts)
        torch.testing.assert_close(ours.weights, weights)
    groups = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5, "norm_topk_prob": True}
    router = Glm4MoeTopkRouter(Glm4MoeConfig(hidden_size=16, n_routed_experts=16, num_experts_per_tok=3, **groups))
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.e_score_correction_bias, std=0.3)
    logits, weights, experts = router(x)
    ours = choose_experts(logits, 3, Scoring("sigmoid", True, 1.5, 4, 2), router.e_score_correction_bias)
    order, theirs = ours.experts.long().sort(dim=1), experts.sort(dim=1)  # transformers does not sort them
    assert torch.equal(order.values, theirs.values)
    torch.testing.assert_close(ours.weights.gather(1, order.indices), weights.gather(1, theirs.indices))


def test_equal_logits_and_nan() -> None:
    logits = torch.zeros(2, 20, device=DEVICE)
    logits[1, 7] = float("nan")
    for choose in (choose_launch, choose_reference):
        for scoring in (Scoring(), Scoring("sigmoid")):
            experts, weights = choose(logits, 3, scoring)
            assert experts[0].tolist() == [0, 1, 2] and experts[1, 0] == 7
            assert weights[0].isfinite().all() and weights[1].isnan().any() and int(experts.max()) < 20


def test_rows_may_have_a_stride() -> None:
    logits, _ = drawn(9, 60, torch.float32)
    wide = torch.full((9, 71), float("nan"), device=DEVICE)
    wide[:, :60] = logits
    for a, b in zip(choose_launch(wide[:, :60], 4, Scoring()), choose_launch(logits, 4, Scoring()), strict=True):
        assert torch.equal(a, b)


def test_what_does_not_fit_is_refused() -> None:
    for wrong in ({"groups": 2}, {"kind": "sigmoid", "groups": 3}, {"kind": "sigmoid", "groups_kept": 2}):
        with pytest.raises(ValueError, match='Scoring: want kind "softmax"'):
            Scoring(**wrong)
    logits, bias = drawn(4, 12, torch.float32)
    for call in (
        lambda: choose_experts(logits, 13, Scoring()),
        lambda: choose_experts(logits, 2, Scoring(), bias),
        lambda: choose_experts(logits, 2, Scoring("sigmoid", groups=4)),
        lambda: choose_experts(logits, 2, Scoring(), given=torch.zeros(4, 2, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match=r"choose_experts: want logits \[T, E\]"):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("scoring", SCORINGS, ids=str)
def test_gpu(scoring: Scoring) -> None:
    logits = torch.randn(8192, 128, device="cuda")
    bias = torch.randn(128, device="cuda") * 0.1 if scoring.kind == "sigmoid" else None
    leaf = logits.clone().requires_grad_()
    got, plain = choose_experts(leaf, 8, scoring, bias), choose_reference(logits, 8, scoring, bias)
    # Two scores may round to the same number in one of them.
    assert (got.experts == plain.experts).all(dim=1).float().mean() > 0.999
    dweights = torch.randn(8192, 8, device="cuda")
    (d,) = torch.autograd.grad(got.weights, leaf, dweights)
    plain_d, true_d = (gradient(logits, got.experts, dweights, scoring, t) for t in (torch.float32, torch.float64))
    assert_rule("dlogits", d, plain_d, true_d, 3)
    assert_survives_stream_and_graph(lambda: choose_launch(logits, 8, scoring, bias))
