"""Laws that every loss obeys, and the arithmetic of advantages, KL estimators and corrections."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from losses import batches_of
from torch import Tensor

from rlft.algos import advantages as adv
from rlft.algos import kl
from rlft.algos.algorithm import build_algorithm, describe
from rlft.algos.losses.grpo import Grpo
from rlft.algos.losses.sft import Sft
from rlft.config.run import Algo
from rlft.errors import ConfigError
from rlft.types import Batch, Prompt, Rollout, Stat, StepInputs

NAN = float("nan")


def tokens(advantages: list[float], **fields: Tensor | None) -> Batch:
    """One sequence of trained tokens, each of weight 1, with a separate advantage."""
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
    value, stats = Grpo(**settings)(now, batch)
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
    assert not any(key.startswith(name) for key in grpo_of([-1.0] * 3, alone)[2])


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


@pytest.mark.parametrize("choice", kl.IN_LOSS)
def test_the_gradient_of_each_kl_choice_is_the_enumerated_one(choice: str) -> None:
    want = true_gradient(forward=choice == "forward")
    assert (expected_gradient(choice) - want).abs().max() < 1e-12
    assert (true_gradient(True) - true_gradient(False)).abs().max() > 0.01  # or the test could not tell them apart


@pytest.mark.parametrize("choice", ["k2", "k3_ratio", "k1_ratio"])
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


def test_grpo_builds_with_its_traits_following_its_numbers() -> None:
    plain, with_kl = (
        build_algorithm(Algo("grpo")),
        build_algorithm(Algo("grpo", {"kl_coef": 0.1, "aggregation": "constant"})),
    )
    assert (plain.loss.needs_reference, plain.loss.zero_adv_zero_grad, plain.aggregation) == (False, True, "token_mean")
    assert (with_kl.loss.needs_reference, with_kl.loss.zero_adv_zero_grad, with_kl.aggregation) == (
        True,
        False,
        "constant",
    )
    rewards, groups = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0, 0, 0])
    assert torch.equal(plain.advantage(rewards, groups, lengths=groups), adv.group_norm(rewards, groups))
    assert (plain.advantage_name, build_algorithm(Algo("sft")).advantage_name) == ("group_norm", "identity")
    assert plain.loss == Grpo(correction="single")


@pytest.mark.parametrize(
    ("updates", "correction", "becomes", "old"),
    [
        (1, "auto", "single", "now"),
        (1, "decoupled", "decoupled", "now"),
        (1, "bypass", "bypass", "sampler"),
        (4, "auto", "decoupled", "trainer"),
        (4, "bypass", "bypass", "sampler"),
        (4, "none", "none", "trainer"),
    ],
)
def test_the_correction_follows_the_number_of_updates(updates: int, correction: str, becomes: str, old: str) -> None:
    made = build_algorithm(Algo("grpo", {"correction": correction}), updates)
    assert (made.loss.correction, made.old, made.loss.needs_sampler) == (becomes, old, correction == "bypass")


def test_a_correction_that_would_be_wrong_or_twice_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r'algo.correction = "single" with 4 updates per rollout batch: .*"decoupled"'
    ):
        build_algorithm(Algo("grpo", {"correction": "single"}), 4)
    with pytest.raises(ConfigError, match=r'algo.correction = "bypass": the noise of the sampler is wider'):
        build_algorithm(Algo("gspo", {"correction": "bypass"}), 4)
    with pytest.raises(
        ConfigError, match=r'algo.correction = "decoupled" weighs tokens apart: set algo.form = "token"'
    ):
        build_algorithm(Algo("gspo", {"correction": "decoupled", "form": "sequence"}), 4)
    assert build_algorithm(Algo("gspo", {"form": "sequence"}), 4).loss.correction == "none"
    assert build_algorithm(Algo("sft"), 4).old == "now" and build_algorithm(Algo("dpo"), 4).old == "now"


@pytest.mark.parametrize(
    ("name", "options", "updates", "message"),
    [
        (
            "grpo",
            {"correction": "bypass", "correction_weight": "token_mask"},
            1,
            'algo.correction_weight = token_mask with algo.correction = "bypass": .* would correct twice',
        ),
        ("grpo", {"correction": "bypass", "correction_cap": 5.0}, 4, "algo.correction_cap = 5.0 .* correct twice"),
        ("grpo", {"correction": "none", "correction_floor": 0.5}, 1, "correction_floor = 0.5 .* there is no weight"),
        (
            "grpo",
            {"correction": "bypass", "sequence_mask_high": 1.1},
            1,
            "sequence_mask_high = 1.1 .* no sequence is ever outside",
        ),
        ("dppo", {"correction": "single"}, 1, "the ratio of dppo is against the sampler by itself, .* count twice"),
        ("topr", {"correction": "decoupled"}, 4, "the ratio of topr is against the sampler by itself"),
        ("vespo", {"correction": "bypass"}, 1, "the ratio of vespo is against the sampler by itself"),
        ("reinforce", {"correction": "decoupled"}, 4, 'algo.correction = "decoupled": this loss has no ratio'),
        ("grpo", {"sequence_mask_low": 1.5}, 1, "algo.sequence_mask_low = 1.5, .*: want a band around 1"),
        ("grpo", {"kl": "reward", "kl_coef": 0.1, "advantage": "gdpo"}, 1, "the KL taken off their sum would be lost"),
        ("grpo", {"delta": 1.1}, 1, r"algo.delta = 1.1: want above 1 \+ clip_high = 1.2"),
    ],
)
def test_what_corrects_twice_or_not_at_all_is_refused(
    name: str, options: dict[str, Any], updates: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_algorithm(Algo(name, options), updates)


def test_losses_against_the_sampler_need_it_and_take_old_from_nowhere() -> None:
    for name in ("dppo", "topr", "vespo"):
        made = build_algorithm(Algo(name), 4)
        assert (made.loss.correction, made.old, made.loss.needs_sampler) == ("none", "now", True)
    assert build_algorithm(Algo("reinforce"), 4).loss.correction == "single"  # its weight is of the policy now
    assert (
        build_algorithm(Algo("grpo", {"off_policy_limit": 0.5})).loss.needs_sampler
        and not build_algorithm(Algo("grpo")).loss.needs_sampler
    )


def weights_of(log_rho: list[list[float]], advantages: list[float], **settings: Any) -> list[list[float]]:
    """Correction weight of each token of some sequences, from the loss of a token: -A weight with r = 1."""
    made = [
        Rollout(Prompt((0,), {}, 0), (1,) * len(row), (True,) * len(row), None, "", "stop", i, 0, 0)
        for i, row in enumerate(log_rho)
    ]
    (batch,) = batches_of(made, "sequence_sum", values=torch.tensor(advantages), share=False)
    flat = torch.tensor([value for row in log_rho for value in row])
    sampler = torch.zeros(len(batch.input_ids)).index_put((batch.train_mask,), -1.0 - flat)
    now = torch.where(batch.train_mask, -1.0, 0.0).requires_grad_()
    value, stats = Grpo(**settings)(now, replace(batch, sampler_logprobs=sampler))
    value.backward()
    assert now.grad is not None
    found = (-now.grad * len(made) / torch.where(batch.train_mask, batch.advantages, 1))[batch.train_mask]
    masked = sum(float(w) == 0 for w in found)
    if "sampling/masked_ratio" in stats:
        assert stats["sampling/masked_ratio"].value == masked
    return [x.tolist() for x in found.split([len(row) for row in log_rho])]


def test_every_correction_by_hand() -> None:
    log = [[math.log(0.4), math.log(3.0)], [math.log(1.5), math.log(1.2)]]
    good, mixed = [1.0, 1.0], [-1.0, 1.0]
    approx = lambda rows: [pytest.approx(row) for row in rows]  # noqa: E731
    assert weights_of(log, good) == approx([[0.4, 2.0], [1.5, 1.2]])
    assert weights_of(log, good, correction_floor=0.5, correction_cap=5.0) == approx([[0.5, 3.0], [1.5, 1.2]])
    mis = {"correction_weight": "token_mask", "correction_floor": 0.5}
    assert weights_of(log, good, **mis) == approx([[0, 0], [1.5, 1.2]])
    assert weights_of(log, good, **mis, correction_cap=5.0) == approx([[0, 3.0], [1.5, 1.2]])  # IcePop
    assert weights_of(log, good, correction_weight="sequence_truncate", correction_cap=1.5) == approx(
        [[1.2] * 2, [1.5] * 2]
    )
    assert weights_of(log, good, correction_weight="sequence_mask", correction_cap=1.5) == approx([[1.2] * 2, [0] * 2])
    # Geometric means: sqrt(1.2) = 1.095 and sqrt(1.8) = 1.342.
    assert weights_of(log, good, sequence_mask_high=1.2) == approx([[0.4, 2.0], [0, 0]])
    assert weights_of(log, good, sequence_mask_low=0.99, sequence_mask_high=1.01, correction="none") == approx(
        [[0, 0], [0, 0]]
    )
    # OPSM: sampler - now is -log rho; the mean of the first is -0.091, of the second -0.294.
    assert weights_of(log, mixed, off_policy_limit=-0.2, correction="none") == approx([[0, 0], [1, 1]])
    assert weights_of(log, [1.0, -1.0], off_policy_limit=-0.2, correction="none") == approx([[1, 1], [1, 1]])


def test_bypass_has_the_samplers_ratio_and_no_factor_besides() -> None:
    # w = now / sampler = 1.1, 1.5 (clipped to 1.28), 0.5.
    sampler = torch.full((3,), -1.0)
    batch = tokens([1, 1, 1], sampler_logprobs=sampler, old_logprobs=sampler)
    now = [-1 + math.log(r) for r in (1.1, 1.5, 0.5)]
    value, grad, stats = grpo_of(now, batch, clip_high=0.28, correction="bypass")
    assert value == pytest.approx(-1.1 - 1.28 - 0.5) and grad == pytest.approx([-1.1, 0, -0.5])
    assert not any(name.startswith("sampling/") for name in stats)


def test_entropy_bonus_and_mask_by_hand() -> None:
    batch = replace(tokens([1, 1, 1]), entropy=torch.tensor([0.0, 0.5, 1.0, 2.0]), inputs=StepInputs(entropy_floor=1.0))
    value, grad, _ = grpo_of([-1.0] * 3, batch, entropy_share=0.6)
    assert value == pytest.approx(-2) and grad == pytest.approx([0, -1, -1])
    value, _, stats = grpo_of([-1.0] * 3, batch, entropy_coef=0.1)
    assert value == pytest.approx(-3 - 0.35) and stats["policy_loss"].value == pytest.approx(-3)
    adaptive = {"entropy_coef": 0.1, "entropy_target": 0.5}
    assert grpo_of([-1.0] * 3, batch, **adaptive)[0] == pytest.approx(-3)  # before the first step nothing is known
    after = replace(batch, inputs=StepInputs(entropy_coef=0.2))
    assert grpo_of([-1.0] * 3, after, **adaptive)[0] == pytest.approx(-3 - 0.7)


def test_adaptive_entropy_follows_trls_rule() -> None:
    """The factor grows after a step at or below the target, falls after the others, and acts only after the former."""
    loss = Grpo(entropy_coef=0.01, entropy_target=0.5, entropy_coef_delta=0.004, entropy_coef_max=0.016)
    state: dict[str, float] = {}
    for entropy, coef, now in ((0.4, 0.014, 0.014), (0.5, 0.016, 0.016), (0.9, 0.012, 0.0), (0.3, 0.016, 0.016)):
        state = loss.adapt(state, entropy)
        assert state == pytest.approx({"entropy_coef": coef, "entropy_coef_now": now})
    assert Grpo().adapt({}, 0.4) == {}


def test_delta_bounds_the_ratio_of_a_bad_token() -> None:
    """Dual clip: for A < 0 the loss is at most c |A|, and has no gradient there; A > 0 does not see it."""
    batch = tokens([-1, -1, 1], old_logprobs=torch.full((3,), -1.0))
    value, grad, _ = grpo_of([-1 + math.log(r) for r in (5.0, 2.0, 5.0)], batch, delta=3.0, correction="none")
    assert value == pytest.approx(3 + 2 - 1.2) and grad == pytest.approx([0, 2, 0])


def test_a_run_prints_its_five_choices() -> None:
    assert describe(build_algorithm(Algo("grpo", {"kl_coef": 0.01, "clip_high": 0.28, "advantage": "group_mean"}))) == [
        "grpo: ratio per token, clipped to [0.8, 1.28], 0.01 x KL (k3_ratio), sampler correction up to 2; "
        "advantage group_mean; token_mean, mean over all tokens of the step",
        "one update per rollout batch: the ratio is exactly 1, so clipping never acts",
    ]
    assert describe(build_algorithm(Algo("gspo"), 4))[1] == (
        "4 updates per rollout batch; old log-probs from a forward of the trainer before the first"
    )
    assert describe(build_algorithm(Algo("sft"))) == [
        "sft: no ratio, no clip, no KL; advantage identity; token_mean, mean over all tokens of the step"
    ]


def test_a_loss_and_an_advantage_can_be_files_of_the_user(tmp_path: Path) -> None:
    file = tmp_path / "my_loss.py"
    file.write_text(
        Path(inspect.getfile(Sft)).read_text() + "\n\ndef twice(rewards, group_ids):\n    return 2 * rewards\n"
        "\n\ndef total(rewards, group_ids):\n    return rewards.sum()\n"
    )
    mine = build_algorithm(Algo(f"{file}", {"aggregation": "prompt_mean"}))
    assert mine.aggregation == "prompt_mean" and mine.loss.zero_adv_zero_grad
    doubled = build_algorithm(Algo("grpo", {"advantage": f"{file}:twice"})).advantage
    assert doubled(torch.tensor([1.5]), torch.tensor([0])).tolist() == [3]
    with pytest.raises(ConfigError, match=r"my_loss.py:total\": want a tensor of shape \[2\], got shape \[\]"):
        build_algorithm(Algo("grpo", {"advantage": f"{file}:total"})).advantage(
            torch.ones(2), torch.zeros(2, dtype=torch.int64)
        )


MINE = """
from dataclasses import dataclass
from rlft.algos.loss import Loss
from rlft.algos.losses.sft import Sft
@dataclass(frozen=True)
class One(Loss):
    def __call__(self, logprobs, batch):
        return (logprobs * batch.weight).sum(), {}
Alias = One
"""


@pytest.mark.parametrize("name", ["mine.py", "mine.py:One", "mine.py:Alias", "mine:One", "rlft.algos.losses.sft:Sft"])
def test_a_loss_is_named_by_its_file_its_class_or_its_module(name: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    made = build_algorithm(Algo(name))
    assert type(made.loss).__name__ == ("Sft" if name.endswith("Sft") else "One")
    assert (made.advantage_name, made.aggregation, made.old) == ("identity", "token_mean", "now")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.py",
            "from rlft.algos.losses.sft import Sft",
            '"a.py": defines no loss; write a frozen dataclass that extends',
        ),
        ("a.py", MINE + "class Two(One): ...", '"a.py": defines One, Two; write which one, "a.py:One"$'),
        ("a.py", MINE.replace("@dataclass(frozen=True)\n", ""), "One is no dataclass, .* write @dataclass"),
        ("a.py", MINE.replace("__call__", "call"), "One lacks __call__, as in"),
        ("a.py:loss", "def loss(logprobs, batch, cfg): ...", 'loss is no loss; .* write "a.py" or "a.py:Class"$'),
        ("a.py:One", "", '"a.py:One": a.py has no "One"'),
        ("b.py", "", '"b.py": no file .*b.py'),
        ("no.module:One", "", "No module named 'no'"),
    ],
)
def test_a_file_without_exactly_one_loss_is_refused(
    name: str, text: str, message: str, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "a.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        build_algorithm(Algo(name))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gprpo", {}, r'algo.name = "gprpo": unknown. Did you mean "grpo"\? Known: .*grpo.*sft'),
        ("kl", {}, r'algo.name = "kl": unknown.* Known: .*grpo.*sft'),
        ("grpo", {"advantage": "group_norms"}, r'algo.advantage = "group_norms": unknown. Did you mean "group_norm"\?'),
        ("grpo", {"clip_hi": 0.3}, "algo.clip_hi: unknown setting. Did you mean .*clip_high"),
        ("grpo", {"clip_low": 1.0}, "algo.clip_low = 1.0: want below 1, the ratio is never negative"),
        ("grpo", {"clip_high": -0.1}, "algo.clip_high = -0.1: want 0 or more"),
        ("grpo", {"kl_coef": NAN}, "algo.kl_coef = nan: want a number"),
        ("grpo", {"correction_cap": 0.5}, "algo.correction_cap = 0.5: want 1 or more"),
        ("sft", {"aggregation": "mean"}, 'algo.aggregation = "mean": want'),
    ],
)
def test_wrong_settings_name_the_field_and_what_is_wanted(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_algorithm(Algo(name, options))


def test_settings_made_in_python_are_checked_too() -> None:
    with pytest.raises(ConfigError, match=r'algo.kl = "k3": want one of k2, k3_ratio, k1_ratio, forward'):
        Grpo(kl="k3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r'algo.aggregation = "mean": want one of token_mean, sequence_mean'):
        Sft(aggregation="mean")  # type: ignore[arg-type]
