"""Given experts in place of the routers' choice: in fused layers and in transformers' own, against a loop over
sequences through transformers' layers whose routers are written here."""

from __future__ import annotations

from dataclasses import replace
from types import MethodType
from typing import Any

import pytest
import torch
from test_architectures import tiny
from test_experts import adapted
from test_fused_experts import KINDS, SMALL
from test_graphs import groups_of
from torch import Tensor

from rlft.errors import EngineError
from rlft.kernels.expert_choice import Scoring
from rlft.models import policy as policies
from rlft.models.fused.levels import L0, L3
from rlft.models.fused.memory import MemoryPlan
from rlft.models.policy import Policy
from rlft.models.routing import routers_of
from rlft.types import Batch

GROUPS = [(5, [7, 3]), (2, [6]), (1, [4])]
"""Prompt and completions: behind a shared prompt, and alone."""
FIELDS: dict[str, dict[str, Any]] = {
    **{kind: {"norm_topk_prob": True} for kind in ("qwen3_moe", "qwen3_next")},
    "olmoe": {"sliding_window": None},  # no field of its config
}
"""Weights of OLMoE and Qwen2-MoE are not divided by their sum."""
PADDED = ("glm4_moe", "gpt_oss", "qwen3_next")
"""What transformers' own layers run padded."""


def weights_of(kind: str, logits: Tensor, chosen: Tensor) -> Tensor:
    """The weights of the chosen experts [T, k], by the formula of the family in transformers."""
    if kind == "glm4_moe":
        scores = logits.sigmoid().gather(1, chosen)
        return 1.5 * scores / (scores.sum(1, keepdim=True) + 1e-20)
    if kind in ("olmoe", "qwen2_moe"):
        return logits.softmax(1).gather(1, chosen)
    if kind == "gpt_oss":
        return logits.gather(1, chosen).softmax(1)
    scores = logits.exp().gather(1, chosen)
    return scores / scores.sum(1, keepdim=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_of_weights_has_the_right_gradient(kind: str) -> None:
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 6, generator=g, dtype=torch.float64, requires_grad=True)
    chosen = torch.rand(4, 6, generator=g).argsort(1)[:, :2]
    assert torch.autograd.gradcheck(lambda x: weights_of(kind, x, chosen), (logits,))


def routers(base: Any) -> list[Any]:
    return [module for _, module in base.named_modules() if type(module).__name__.lower().endswith("topkrouter")]


def batch_of(base: Any, groups: list[tuple[int, list[int]]] = GROUPS) -> Batch:
    """Groups with random experts of every token."""
    g, found = torch.Generator().manual_seed(4), routers(base)
    batch = groups_of(groups, g, 61)
    shape = (len(batch.input_ids), len(found), found[0].weight.shape[0])
    return replace(batch, routes=torch.rand(shape, generator=g).argsort(2)[..., : found[0].top_k].to(torch.uint8))


def transformers(model: Any, kind: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs and gradients of one row per sequence, by transformers' experts, PEFT's sum and routers of here."""
    base = model.get_base_model()
    base.set_experts_implementation("eager")
    rows: dict[str, Tensor] = {}

    def forward(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        logits = torch.nn.functional.linear(x.flatten(0, -2), self.weight, getattr(self, "bias", None))
        return logits, weights_of(kind, logits, rows[self.name]), rows[self.name]

    for i, router in enumerate(routers(base)):
        router.name, router.forward = i, MethodType(forward, router)
    starts, values = batch.cu_seqlens.tolist(), torch.zeros(len(batch.input_ids), dtype=torch.float64)
    assert batch.routes is not None
    for sequence, prefix in enumerate(batch.prefix.tolist()):
        if not batch.train_mask[starts[sequence] : starts[sequence + 1]].any():
            continue
        parts = [torch.arange(starts[i], starts[i + 1]) for i in (prefix, sequence) if i >= 0]
        places = torch.cat(parts)
        rows |= {i: batch.routes[places, i].long() for i in range(len(routers(base)))}  # type: ignore[misc]
        log_p = model(input_ids=batch.input_ids[None, places], use_cache=False).logits[0].log_softmax(-1)
        own = log_p[:-1].gather(1, batch.input_ids[places][1:, None]).squeeze(1)
        values = values.index_put((places[1:],), own)
    return weighed(torch.where(batch.train_mask, values, 0), model)


def weighed(logprobs: Tensor, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    (logprobs * torch.linspace(-1, 1, len(logprobs), dtype=logprobs.dtype)).sum().backward()
    return logprobs.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def fields_of(kind: str) -> dict[str, Any]:
    return SMALL | FIELDS.get(kind, {})


def ours(kind: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Policy]:
    """The policy's log-probs, and gradients by PEFT's names."""
    policy = Policy(adapted(kind, **fields_of(kind)), torch.float64)
    logprobs, _ = policy.logprobs(batch)
    (logprobs * torch.linspace(-1, 1, len(logprobs), dtype=logprobs.dtype)).sum().backward()
    names = {id(parameter): name for name, parameter in policy.model.named_parameters()}
    flat = policy.flat
    gradients = {names[id(parameter)]: flat.gradients[parameter] for parameter in flat.gradients}
    return logprobs.detach(), gradients, policy


def close(got: tuple[Any, ...], want: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert float((got[0] - want[0]).abs().max()) < 1e-6
    assert want[1] and got[1].keys() >= want[1].keys()
    for name, truth in want[1].items():
        assert float((got[1][name] - truth).abs().max()) <= 1e-6 * max(1.0, float(truth.abs().max())), name


@pytest.mark.parametrize("kind", KINDS)
def test_fused_layers_take_given_experts(kind: str) -> None:
    model = adapted(kind, **fields_of(kind))
    batch = batch_of(model.get_base_model())
    got = ours(kind, batch)
    assert got[2].fused is not None and got[2].fixed_routing is None
    close(got, transformers(model, kind, batch))
    live = got[2].score(replace(batch, routes=None))
    assert float((live - got[0]).abs().max()) > 1e-3, "another choice is another distribution"
    assert torch.equal(got[2].score(batch), got[0]), "a pass without gradient"
    assert torch.equal(got[2].score(batch, "reference"), got[2].score(replace(batch, routes=None), "reference"))


@pytest.mark.parametrize("kind", [*KINDS, "qwen3_next"])
def test_transformers_own_layers_take_given_experts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "fuse", lambda *_: "this is a test")
    model = adapted(kind, **fields_of(kind))
    batch = batch_of(model.get_base_model())
    got = ours(kind, batch)
    assert got[2].fused is None and got[2].packed == (kind not in PADDED)
    close(got, transformers(model, kind, batch))
    assert not any(router._forward_hooks for router in routers(got[2].base)), "hooks stay for a pass only"


def test_routes_of_another_model_or_of_an_unknown_router_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(adapted("qwen3_moe", **SMALL), torch.float64)
    batch = batch_of(policy.base)
    assert batch.routes is not None
    with pytest.raises(EngineError, match=r"experts of 1 layers, .* cannot take: it has 2 layers with experts"):
        policy.score(replace(batch, routes=batch.routes[:, :1]))
    monkeypatch.setattr(policies, "fuse", lambda *_: "this is a test")
    policy = Policy(adapted("qwen3_moe", **SMALL), torch.float64)
    for router in routers(policy.base):
        router.register_forward_hook(lambda _, args, returned: (returned[0], returned[1] ** 2, returned[2]))
    reason = "the router of Qwen3MoeSparseMoeBlock has a form that rlft does not know"
    assert policy.fixed_routing == reason == routers_of(policy.base)
    with pytest.raises(EngineError, match=reason):
        policy.score(batch)


@pytest.mark.parametrize(
    ("kind", "scoring"),
    [
        ("deepseek_v3", Scoring("sigmoid", scale=2.5)),
        ("flex_olmo", Scoring(renormalised=False)),
        ("minimax", Scoring()),
        ("lfm2_moe", "the router of Lfm2MoeSparseMoeBlock has a form that rlft does not know"),
        ("granitemoe", "the router of GraniteMoeMoE has a form that rlft does not know"),
    ],
)
def test_how_a_router_scores_is_read_from_what_it_returns(kind: str, scoring: Scoring | str) -> None:
    """Families without fused layers; the second argument of LFM2's router and the sorted rows of Granite's are not
    known."""
    found = routers_of(tiny(kind, torch.float32).base)
    assert scoring == (found if isinstance(found, str) else found[0].scoring)


@pytest.mark.parametrize("kind", ["qwen3_moe", "glm4_moe", "gpt_oss"])
def test_levels_and_tiles_keep_the_given_experts(kind: str) -> None:
    """The backward takes the experts of the forward, whatever it computes again; tiles have those of their rows."""
    batch, found = batch_of(adapted(kind, **fields_of(kind)).get_base_model(), [(70, [30, 9]), (3, [80])]), []
    for level, tile in ((L0, 64), (L3, 64), (L3, 1024)):
        policy = Policy(adapted(kind, **fields_of(kind)), torch.float64)
        assert policy.fused is not None
        policy.fused.plan = MemoryPlan((level,) * len(policy.fused.layers), tile, "layer", 2**20, 0, 0, 0)
        (policy.logprobs(batch)[0] * torch.linspace(-1, 1, len(batch.input_ids))).sum().backward()
        found.append(policy.flat.gradient.clone())
    assert torch.equal(found[0], found[1]) and found[0].any()
    assert float((found[2] - found[0]).abs().max()) < 1e-12 * float(found[0].abs().max())
