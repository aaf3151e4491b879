"""Laws that every loss obeys, and the arithmetic of advantages, KL estimators and corrections."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from rlft.algorithm import build, describe
from rlft.algos import advantages as adv
from rlft.algos import corrections, dpo, grpo, gspo, kl, sft
from rlft.batch import count, pack
from rlft.config import Algo
from rlft.errors import ConfigError
from rlft.types import Aggregation, Batch, PackPlan, Prompt, Rollout, Stat

NAN, VOCAB = float("nan"), 7
LOSSES: dict[str, tuple[ModuleType, Any]] = {
    "grpo": (grpo, grpo.Config()),
    "grpo-uncorrected": (grpo, grpo.Config(correction="none")),
    "grpo-kl": (grpo, grpo.Config(kl_coef=0.3, clip_high=0.28)),
    "grpo-k2": (grpo, grpo.Config(kl_coef=0.3, kl="k2", correction="none")),
    "grpo-forward": (grpo, grpo.Config(kl_coef=0.3, kl="forward", correction_cap=1.1)),
    "grpo-decoupled": (grpo, grpo.Config(clip_high=0.28, correction="decoupled")),
    "grpo-bypass": (grpo, grpo.Config(clip_high=0.28, correction="bypass")),
    "gspo": (gspo, gspo.Config(clip_low=0.2, clip_high=0.3)),
    "gspo-uncorrected": (gspo, gspo.Config(clip_low=0.2, clip_high=0.3, correction="none")),
    "gspo-sequence": (gspo, gspo.Config(clip_low=0.2, clip_high=0.3, form="sequence")),
    "sft": (sft, sft.Config()),
    "dpo": (dpo, dpo.Config()),
}
PAIRS = ("dpo",)
"""Losses over whole groups: here of two rows, the second of which is the better one."""


class Toy:
    """logprobs of a packed batch in float64: the token, its position and its source's token through an embedding."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(VOCAB, 4, generator=g, dtype=torch.float64, requires_grad=True)
        self.head = torch.randn(4, VOCAB, generator=g, dtype=torch.float64, requires_grad=True)
        self.shift = torch.randn(VOCAB, VOCAB, generator=g, dtype=torch.float64) * 0.5

    def logprobs(self, batch: Batch, off: float = 0.0) -> Tensor:
        """[T]; off: how far the weights are moved, for old, sampler and reference policies."""
        hidden = self.embedding[batch.input_ids[batch.source.clamp(min=0)]]
        log_p = (hidden @ self.head + off * self.shift[batch.input_ids[batch.source.clamp(min=0)]]).log_softmax(-1)
        return log_p.gather(1, batch.input_ids[:, None]).squeeze(1)

    def filled(self, batch: Batch, old: bool = True) -> Batch:
        """The batch with log-probs of three other policies; one engine noise per token id and position."""
        with torch.no_grad():
            noise = 0.3 * torch.sin(1.0 * batch.position_ids + batch.input_ids)
            before = self.logprobs(batch, 0.7)
            return replace(
                batch, old_logprobs=before if old else None, sampler_logprobs=before + noise,
                ref_logprobs=self.logprobs(batch, -0.8),
            )  # fmt: skip

    def gradient(self, batches: list[Batch], name: str, old: bool = True) -> tuple[float, Tensor]:
        """Loss summed over micro-batches, and the flat gradient."""
        module, cfg = LOSSES[name]
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            total = total + module.loss(self.logprobs(batch), self.filled(batch, old), cfg)[0]
        grads = torch.autograd.grad(total, (self.embedding, self.head))
        return total.item(), torch.cat([g.flatten() for g in grads])


def step(lengths: tuple[int, ...] = (3, 1, 4, 2, 0, 5, 2, 3), group: int = 4) -> list[Rollout]:
    made = []
    for i, n in enumerate(lengths):
        g, s = divmod(i, group)
        prompt = Prompt(tuple((g + 2 * t) % VOCAB for t in range(2 + g)), {}, g)
        ids = tuple((3 * i + t * t + 1) % VOCAB for t in range(n))
        mask = tuple(not (i == 2 and t == 1) for t in range(n))
        made.append(Rollout(prompt, ids, mask, None, "", "stop", s, 0, 0))
    return made


def batches_of(
    made: list[Rollout], aggregation: Aggregation = "token_mean", budget: int = 1000, share: bool = True,
    values: Tensor | None = None, whole_groups: bool = False,
) -> list[Batch]:  # fmt: skip
    plan = PackPlan((True,) * len(made), aggregation, budget, 6, 1.0, whole_groups, share)
    values = torch.linspace(-1, 1.5, len(made)) if values is None else values
    return pack(made, values, plan, count(made, plan))


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
@pytest.mark.parametrize("name", LOSSES)
def test_no_split_of_a_step_changes_loss_or_gradient(name: str, aggregation: Aggregation) -> None:
    toy, pair = Toy(), name in PAIRS
    made, values = step(group=2 if pair else 4), torch.linspace(-1, 1.5, 8)
    values = torch.tensor([-1.0, 1.0] * 4) if pair else values
    value, whole = toy.gradient(batches_of(made, aggregation, values=values, whole_groups=pair), name)
    assert whole.abs().max() > 1e-3
    for budget in (1, 8, 13):
        for share in (True, False):
            split = batches_of(made, aggregation, budget, share, values, pair)
            assert len(split) > 1
            other_value, other = toy.gradient(split, name)
            assert other_value == pytest.approx(value, abs=1e-12)
            assert (other - whole).abs().max() < 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_groups_changes_nothing(name: str) -> None:
    toy, pair = Toy(), name in PAIRS
    made, values = step(group=2 if pair else 4), torch.linspace(-1, 1.5, 8)
    _, first = toy.gradient(batches_of(made, "prompt_mean", values=values, whole_groups=pair), name)
    turned = [*range(4, 8), *range(4)]
    other = batches_of([made[i] for i in turned], "prompt_mean", values=values[turned], whole_groups=pair)
    _, second = toy.gradient(other, name)
    assert (first - second).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["grpo-uncorrected", "gspo-uncorrected", "gspo-sequence", "sft"])
def test_the_on_policy_gradient_is_that_of_reinforce(name: str) -> None:
    toy = Toy()
    for batch in batches_of(step(), "sequence_sum", budget=13):
        reinforce = -(batch.weight.double() * batch.advantages * toy.logprobs(batch)).sum()
        grads = torch.autograd.grad(reinforce, (toy.embedding, toy.head))
        want = torch.cat([g.flatten() for g in grads])
        assert want.abs().max() > 1e-3
        assert (toy.gradient([batch], name, old=False)[1] - want).abs().max() < 1e-14


def tokens(advantages: list[float], **fields: Tensor | None) -> Batch:
    """One sequence of trained tokens, each of weight 1, with an advantage of its own."""
    n = len(advantages)
    prompt = Prompt((0,), {}, 0)
    made = [Rollout(prompt, (1,) * n, (True,) * n, None, "", "stop", 0, 0, 0)]
    (batch,) = batches_of(made, "sequence_sum", values=torch.ones(1))
    batch = replace(batch, advantages=torch.tensor([0.0, *advantages]))
    fields = {k: None if v is None else torch.cat([torch.zeros(1), v]) for k, v in fields.items()}
    return replace(batch, **fields)  # type: ignore[arg-type]


def grpo_of(logprobs: list[float], batch: Batch, **settings: Any) -> tuple[float, list[float], dict[str, Stat]]:
    """Loss, gradient per completion token, stats."""
    now = torch.tensor([0.0, *logprobs], requires_grad=True)
    value, stats = grpo.loss(now, batch, grpo.Config(**settings))
    value.backward()
    assert now.grad is not None
    return value.item(), now.grad[1:].tolist(), stats


def test_a_clipped_token_has_zero_gradient_on_its_side_only() -> None:
    # r = 1.5 and 0.5, each with A = +1 and A = -1: clipped are (1.5, +1) and (0.5, -1).
    ratios = [1.5, 1.5, 0.5, 0.5]
    batch = tokens([1, -1, 1, -1], old_logprobs=torch.full((4,), -1.0))
    value, grad, stats = grpo_of([-1 + math.log(r) for r in ratios], batch, correction="none")
    assert value == pytest.approx(-1.2 + 1.5 - 0.5 + 0.8)
    assert grad == pytest.approx([0, 1.5, -0.5, 0])
    for side, clipped in (("low_mean", 1), ("high_mean", 1), ("region_mean", 2)):
        assert stats[f"clip_ratio/{side}"] == Stat("mean", torch.tensor(clipped), torch.tensor(4))


def test_the_two_clip_bounds_are_not_mixed_up() -> None:
    batch = tokens([1, -1], old_logprobs=torch.full((2,), -1.0))
    value, grad, _ = grpo_of([-1 + math.log(1.25), -1 + math.log(0.75)], batch, clip_low=0.3, clip_high=0.2)
    assert value == pytest.approx(-1.2 + 0.75) and grad == pytest.approx([0, 0.75])


def test_the_correction_weighs_a_token_by_old_over_sampler_up_to_the_cap() -> None:
    # rho = exp(old - sampler) = 0.5, 1.5, 4 -> weights 0.5, 1.5, 2.
    sampler = torch.tensor([-1.0, -1.0, -1.0]) - torch.tensor([0.5, 1.5, 4.0]).log()
    batch = tokens([1, 1, 1], sampler_logprobs=sampler)
    value, grad, stats = grpo_of([-1.0] * 3, batch)
    assert value == pytest.approx(-4.0) and grad == pytest.approx([-0.5, -1.5, -2.0])
    name = "sampling/importance_sampling_ratio"
    assert stats[f"{name}/max"].value == pytest.approx(4) and stats[f"{name}/min"].value == pytest.approx(0.5)
    assert stats[f"{name}/mean"].value == pytest.approx(6) and stats[f"{name}/mean"].count == 3
    assert grpo_of([-1.0] * 3, batch, correction="none")[0] == pytest.approx(-3.0)
    alone = tokens([1, 1, 1])
    assert grpo_of([-1.0] * 3, alone)[0] == pytest.approx(-3.0)
    assert corrections.stats("single", torch.zeros(4), alone) == {}


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_a_token_of_weight_zero_may_hold_anything_and_equals_the_row_removed(name: str, bad: float) -> None:
    toy, (module, cfg) = Toy(), LOSSES[name]
    (batch,) = batches_of(step(group=2 if name in PAIRS else 4), whole_groups=name in PAIRS)
    out = batch.seq_ids == int(batch.seq_ids[batch.train_mask][0])
    weight = torch.where(out, 0, batch.weight)
    filled = replace(toy.filled(batch), weight=weight)
    spoiled = {
        f: torch.where(out, bad, getattr(filled, f)) for f in ("old_logprobs", "sampler_logprobs", "ref_logprobs")
    }
    now = toy.logprobs(batch).detach()
    grads = []
    for logprobs, fields in ((now, {}), (torch.where(out, bad, now), spoiled)):
        leaf = logprobs.clone().requires_grad_()
        value, stats = module.loss(leaf, replace(filled, **fields), cfg)
        value.backward()
        assert value.isfinite() and leaf.grad is not None and leaf.grad.isfinite().all()
        assert all(math.isfinite(stat.value) for stat in stats.values())
        grads.append(torch.where(out, 0, leaf.grad))
        assert (leaf.grad[out] == 0).all()
    assert torch.equal(grads[0], grads[1]) and grads[0].abs().max() > 1e-3


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("which", ["old_logprobs", "sampler_logprobs", "ref_logprobs"])
@pytest.mark.parametrize("name", LOSSES)
def test_wild_log_ratios_leave_loss_and_gradient_finite(name: str, which: str, size: float) -> None:
    toy, (module, cfg) = Toy(), LOSSES[name]
    (batch,) = batches_of(step(group=2 if name in PAIRS else 4), whole_groups=name in PAIRS)
    filled = toy.filled(batch)
    filled = replace(filled, **{which: (getattr(filled, which) + size).float()})
    now = toy.logprobs(batch).float().detach().requires_grad_()
    value, stats = module.loss(now, filled, cfg)
    value.backward()
    assert value.isfinite() and now.grad is not None and now.grad.isfinite().all()
    assert all(math.isfinite(stat.value) for stat in stats.values())


def test_a_batch_of_zero_advantage_has_exactly_zero_gradient_where_the_loss_says_so() -> None:
    toy = Toy()
    for name in LOSSES.keys() - set(PAIRS):  # a pair of zero advantages has no better side
        module, cfg = LOSSES[name]
        flag = module.ZERO_ADV_ZERO_GRAD
        says = flag(cfg) if callable(flag) else flag
        _, gradient = toy.gradient(batches_of(step(), values=torch.zeros(8)), name)
        assert bool((gradient == 0).all()) == says, name


# Two policies over three tokens; every expectation below is the exact sum over them.
THETA = torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64)
REF = torch.tensor([-0.2, 0.4, 0.6], dtype=torch.float64).log_softmax(0)
OLD = torch.tensor([0.1, 0.3, -0.5], dtype=torch.float64).log_softmax(0)


def expected_gradient(choice: str, behind: Tensor | None = None) -> Tensor:
    """Gradient of the penalty averaged over samples of the policy itself, or of an older one with r = now / old."""
    theta = THETA.clone().requires_grad_()
    now = theta.log_softmax(0)
    old = now.detach() if behind is None else behind
    value = (old.exp() * kl.penalty(choice, now, REF, (now - old).exp())).sum()
    return torch.autograd.grad(value, theta)[0]


def true_gradient(forward: bool) -> Tensor:
    theta = THETA.clone().requires_grad_()
    now = theta.log_softmax(0)
    value = (REF.exp() * (REF - now)).sum() if forward else (now.exp() * (now - REF)).sum()
    return torch.autograd.grad(value, theta)[0]


@pytest.mark.parametrize("choice", kl.CHOICES)
def test_the_gradient_of_each_kl_choice_is_the_enumerated_one(choice: str) -> None:
    want = true_gradient(forward=choice == "forward")
    assert (expected_gradient(choice) - want).abs().max() < 1e-12
    assert (true_gradient(True) - true_gradient(False)).abs().max() > 0.01  # or the test could not tell them apart


@pytest.mark.parametrize("choice", ["k2", "k3_ratio"])
def test_the_reverse_kl_keeps_its_gradient_on_samples_of_an_older_policy(choice: str) -> None:
    assert (expected_gradient(choice, behind=OLD) - true_gradient(forward=False)).abs().max() < 1e-12


def test_kl_estimators_by_hand() -> None:
    d = torch.tensor([0.0, math.log(2), -math.log(2)])
    assert kl.k3(d).tolist() == pytest.approx([0, 0.5 - 1 + math.log(2), 2 - 1 - math.log(2)])
    mean = (THETA.softmax(0) * kl.k3(THETA.log_softmax(0) - REF)).sum()
    assert mean.item() == pytest.approx((THETA.softmax(0) * (THETA.log_softmax(0) - REF)).sum().item(), abs=1e-14)
    assert kl.difference(torch.tensor([1e4, -1e4]), torch.zeros(2)).tolist() == [20, -20]


def test_the_kl_term_is_added_with_its_factor_and_logged_as_k1_and_k3() -> None:
    batch = tokens([0, 0], ref_logprobs=torch.tensor([-1.0, -1.0 - math.log(2)]))
    value, _, stats = grpo_of([-1.0, -1.0], batch, kl_coef=0.1)
    k3 = 0.5 - 1 + math.log(2)  # d = 0 and ln 2
    assert value == pytest.approx(0.1 * k3)
    assert stats["kl"].value == pytest.approx(k3) and stats["kl/k1"].value == pytest.approx(math.log(2))
    assert "kl" not in grpo_of([-1.0, -1.0], batch)[2]


def test_advantages_by_hand() -> None:
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 4.0, 2.0]), torch.tensor([7, 7, 7, 3, 3])
    third, std = 1 / 3, math.sqrt(1 / 3)
    assert adv.group_mean(rewards, groups).tolist() == pytest.approx([2 * third, -third, -third, 1, -1])
    assert adv.leave_one_out(rewards, groups).tolist() == pytest.approx([1, -0.5, -0.5, 2, -2])
    one, two = std + 1e-4, math.sqrt(2) + 1e-4
    want = [2 * third / one, -third / one, -third / one, 1 / two, -1 / two]
    assert adv.group_norm(rewards, groups).tolist() == pytest.approx(want)
    assert adv.identity(rewards, groups).tolist() == rewards.tolist()


ESTIMATORS = [adv.group_norm, adv.group_mean, adv.leave_one_out]


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_equal_rewards_and_groups_of_one_give_exactly_zero(estimate: Any) -> None:
    # The mean of three times 0.1 is 0.10000000000000002: subtracting it does not give 0.
    rewards, groups = torch.tensor([0.1] * 3 + [5.0], dtype=torch.float64), torch.tensor([0] * 3 + [1])
    assert sum([0.1] * 3) / 3 != 0.1
    assert estimate(rewards, groups).tolist() == [0.0] * 4
    assert estimate(torch.tensor([]), torch.tensor([], dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize("estimate", [*ESTIMATORS, adv.identity])
def test_an_invalid_reward_gets_zero_and_leaves_its_group_as_if_it_were_not_there(estimate: Any) -> None:
    rewards, groups = torch.tensor([1.0, NAN, 0.0, 0.5, NAN, 2.0]), torch.tensor([0, 0, 0, 0, 1, 1])
    out = estimate(rewards, groups)
    keep = ~rewards.isnan()
    assert out.dtype == torch.float32 and out[~keep].tolist() == [0, 0]
    assert torch.equal(out[keep], estimate(rewards[keep], groups[keep]))


def test_spread_of_rewards_as_logged() -> None:
    rewards, groups = torch.tensor([1.0, 1.0, 0.0, 2.0, NAN, 3.0, NAN]), torch.tensor([0, 0, 1, 1, 1, 2, 3])
    assert adv.frac_zero_std(rewards, groups) == pytest.approx(2 / 3)  # groups 0 and 2 of 0, 1 and 2
    assert adv.reward_std(rewards) == pytest.approx(math.sqrt((0.16 + 0.16 + 1.96 + 0.36 + 2.56) / 4))
    assert adv.reward_std(torch.tensor([2.0])) == 0 and math.isnan(adv.reward_std(torch.tensor([NAN])))
    assert math.isnan(adv.frac_zero_std(torch.tensor([NAN]), torch.tensor([0])))


def test_grpo_builds_with_its_traits_following_its_numbers() -> None:
    plain, with_kl = build(Algo("grpo")), build(Algo("grpo", {"kl_coef": 0.1, "aggregation": "constant"}))
    assert (plain.needs_reference, plain.zero_adv_zero_grad, plain.aggregation) == (False, True, "token_mean")
    assert (with_kl.needs_reference, with_kl.zero_adv_zero_grad, with_kl.aggregation) == (True, False, "constant")
    assert plain.advantage is adv.group_norm and build(Algo("sft")).advantage is adv.identity
    assert plain.loss is grpo.loss and plain.config == grpo.Config(correction="single")


@pytest.mark.parametrize(
    ("updates", "correction", "becomes", "old"),
    [(1, "auto", "single", "now"), (1, "decoupled", "decoupled", "now"), (1, "bypass", "bypass", "sampler"),
     (4, "auto", "decoupled", "trainer"), (4, "bypass", "bypass", "sampler"), (4, "none", "none", "trainer")],
)  # fmt: skip
def test_the_correction_follows_the_number_of_updates(updates: int, correction: str, becomes: str, old: str) -> None:
    made = build(Algo("grpo", {"correction": correction}), updates)
    assert (made.config.correction, made.old, made.needs_sampler) == (becomes, old, correction == "bypass")


def test_a_correction_that_would_be_wrong_or_twice_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r'algo.correction = "single" with 4 updates per rollout batch: .*"decoupled"'
    ):
        build(Algo("grpo", {"correction": "single"}), 4)
    with pytest.raises(ConfigError, match=r'algo.correction = "bypass": the noise of the sampler is wider'):
        build(Algo("gspo", {"correction": "bypass"}), 4)
    with pytest.raises(
        ConfigError, match=r'algo.correction = "decoupled" weighs tokens apart: set algo.form = "token"'
    ):
        build(Algo("gspo", {"correction": "decoupled", "form": "sequence"}), 4)
    assert build(Algo("gspo", {"form": "sequence"}), 4).config.correction == "none"
    assert build(Algo("sft"), 4).old == "now" and build(Algo("dpo"), 4).old == "now"


def test_bypass_has_the_samplers_ratio_and_no_factor_besides() -> None:
    # w = now / sampler = 1.1, 1.5 (clipped to 1.28), 0.5.
    sampler = torch.full((3,), -1.0)
    batch = tokens([1, 1, 1], sampler_logprobs=sampler, old_logprobs=sampler)
    now = [-1 + math.log(r) for r in (1.1, 1.5, 0.5)]
    value, grad, stats = grpo_of(now, batch, clip_high=0.28, correction="bypass")
    assert value == pytest.approx(-1.1 - 1.28 - 0.5) and grad == pytest.approx([-1.1, 0, -0.5])
    assert not any(name.startswith("sampling/") for name in stats)


def test_a_run_prints_its_five_choices() -> None:
    assert describe(build(Algo("grpo", {"kl_coef": 0.01, "clip_high": 0.28, "advantage": "group_mean"}))) == [
        "grpo: ratio per token, clipped to [0.8, 1.28], 0.01 x KL (k3_ratio), sampler correction up to 2; "
        "advantage group_mean; token_mean, mean over all tokens of the step",
        "one update per rollout batch: the ratio is exactly 1, so clipping never acts",
    ]
    assert describe(build(Algo("gspo"), 4))[1] == (
        "4 updates per rollout batch; old log-probs from a forward of the trainer before the first"
    )
    assert describe(build(Algo("sft"))) == [
        "sft: no ratio, no clip, no KL; advantage identity; token_mean, mean over all tokens of the step"
    ]


def test_a_loss_and_an_advantage_can_be_files_of_the_user(tmp_path: Path) -> None:
    file = tmp_path / "my_loss.py"
    file.write_text(Path(sft.__file__).read_text() + "\n\ndef twice(rewards, group_ids):\n    return 2 * rewards\n"
                    "\n\ndef total(rewards, group_ids):\n    return rewards.sum()\n")  # fmt: skip
    mine = build(Algo(f"{file}:loss", {"aggregation": "prompt_mean"}))
    assert mine.aggregation == "prompt_mean" and mine.zero_adv_zero_grad
    doubled = build(Algo("grpo", {"advantage": f"{file}:twice"})).advantage
    assert doubled(torch.tensor([1.5]), torch.tensor([0])).tolist() == [3]
    with pytest.raises(ConfigError, match=r"my_loss.py:total\": want a tensor of shape \[2\], got shape \[\]"):
        build(Algo("grpo", {"advantage": f"{file}:total"})).advantage(torch.ones(2), torch.zeros(2, dtype=torch.int64))
    bad = tmp_path / "bad.py"
    bad.write_text("ADVANTAGE = 'identity'\ndef loss(logprobs, batch, cfg): ...\n")
    with pytest.raises(ConfigError, match=r"not an algorithm, it lacks Config, AGGREGATION, RATIO, NEEDS_REFERENCE"):
        build(Algo(f"{bad}:loss"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gprpo", {}, r'algo.name = "gprpo": not in rlft.algos. Did you mean "grpo"\? Known: .*grpo.*sft;'),
        ("kl", {}, r'algo.name = "kl": not in rlft.algos.* Known: .*grpo.*sft'),
        ("grpo", {"advantage": "group_norms"}, r'algo.advantage = "group_norms": unknown. Did you mean "group_norm"\?'),
        ("grpo", {"clip_hi": 0.3}, "algo.clip_hi: unknown setting. Did you mean .*clip_high"),
        ("grpo", {"clip_low": 1.0}, "algo.clip_low = 1.0: want below 1, the ratio is never negative"),
        ("grpo", {"clip_high": -0.1}, "algo.clip_high = -0.1: want 0 or more"),
        ("grpo", {"kl_coef": NAN}, "algo.kl_coef = nan: want 0 or more"),
        ("grpo", {"correction_cap": 0.5}, "algo.correction_cap = 0.5: want 1 or more"),
        ("sft", {"aggregation": "mean"}, 'algo.aggregation = "mean": want'),
    ],
)
def test_wrong_settings_name_the_field_and_what_is_wanted(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Algo(name, options))


def test_settings_made_in_python_are_checked_too() -> None:
    with pytest.raises(ConfigError, match=r'algo.kl = "k3": want one of k2, k3_ratio, forward'):
        grpo.Config(kl="k3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r'algo.aggregation = "mean": want one of token_mean, sequence_mean'):
        sft.Config(aggregation="mean")  # type: ignore[arg-type]
