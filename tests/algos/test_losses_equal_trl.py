"""grpo against TRL 1.16's own loss code, sft against transformers' cross-entropy: values, gradients and metrics.

TRL's `GRPOTrainer._compute_loss` runs on a stand-in that holds its settings and gives it log-probs, so that ratios far
from 1, both clip sides, ragged lengths, an empty completion and corrections other than 1 are all in play.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import records
import torch
from torch import Tensor
from trl_code import run_block, trl

from rlft.algos import advantages as adv
from rlft.algos.loss import Loss
from rlft.algos.losses.cispo import Cispo
from rlft.algos.losses.gmpo import Gmpo
from rlft.algos.losses.grpo import Grpo
from rlft.algos.losses.gspo import Gspo
from rlft.algos.losses.rloo import Rloo
from rlft.algos.losses.sapo import Sapo
from rlft.algos.losses.sft import Sft
from rlft.algos.losses.vespo import Vespo
from rlft.trainer.metrics import Metrics
from rlft.trainer.prepare import PackedStep
from rlft.types import Aggregation, Batch, PackPlan, Prompt, Rollout, StepInputs

GRPO, RLOO = ("trainer.grpo_trainer", "GRPOTrainer"), ("trainer.rloo_trainer", "RLOOTrainer")
LENGTHS = (5, 2, 7, 1, 0, 4, 3, 6)
MAX_LEN = 9
ADVANTAGES = torch.tensor([1.2, -0.7, 0.4, -1.1, 0.9, -0.3, 0.8, -1.5])


ARGS = {"delta": None, "steps_per_generation": 1, "use_bias_correction_kl": False}
BASE = {
    "aux_loss_enabled": False,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "beta": 0.0,
    "importance_sampling_level": "token",
    "epsilon_low": 0.2,
    "epsilon_high": 0.28,
    "use_vllm": True,
    "vllm_importance_sampling_correction": True,
    "current_gradient_accumulation_steps": 1,
    "max_completion_length": MAX_LEN,
    "_entropy_bonus_enabled": False,
    "use_adaptive_entropy": False,
    "model": SimpleNamespace(training=True),
    "accelerator": SimpleNamespace(
        num_processes=1,
        reduce=lambda x, reduction: x,
        gather=lambda x: x,
        sync_gradients=True,
        pad_across_processes=lambda x, **_: x,
    ),
}
"""Attributes of TRL's trainers that their loss reads."""


def step() -> list[Rollout]:
    """Two groups of four; row 2 has two tool tokens."""
    made = []
    for i, n in enumerate(LENGTHS):
        prompt = Prompt((1, 2, 3), {}, i // 4)
        mask = tuple(not (i == 2 and t in (2, 3)) for t in range(n))
        made.append(Rollout(prompt, tuple(range(4, 4 + n)), mask, None, "", "stop", i % 4, 0, 0))
    return made


def packed(values: dict[str, Tensor], aggregation: Aggregation) -> tuple[list[Batch], list[Tensor]]:
    """Micro-batches with the log-probs of `values` ([8, 7] each), and the cells of that grid that each token is."""
    made = step()
    plan = PackPlan(aggregation, 16, MAX_LEN, 1.0)
    batches, cells = [], []
    for batch in records.packed(made, plan, ADVANTAGES):
        own = [s for s in range(len(batch.prefix)) if batch.group_ids[s] >= 0]
        row = torch.tensor([records.rows(batch, made)[own.index(s)] if s in own else 0 for s in batch.seq_ids.tolist()])
        cell = row * max(LENGTHS) + (batch.position_ids - 3).clamp(min=0)
        batches.append(replace(batch, **{name: grid.flatten()[cell].detach() for name, grid in values.items()}))
        cells.append(cell)
    return batches, cells


def masks() -> tuple[Tensor, Tensor]:
    """Completion mask and tool mask of the grid, as TRL has them."""
    mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    tool = torch.ones_like(mask)
    for i, rollout in enumerate(step()):
        mask[i, : LENGTHS[i]] = 1
        tool[i, : LENGTHS[i]] = torch.tensor(rollout.completion_mask, dtype=torch.long)
    return mask, tool


def trl_loss(
    now: Tensor,
    values: dict[str, Tensor],
    loss_type: str,
    cap: float = 2.0,
    where: tuple[str, str] = GRPO,
    entropy: Tensor | None = None,
    weight: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, Any]:
    """TRL's loss on the grid of log-probs, and its metrics. weight: TRL's importance
    ratio, in place of the token's up to `cap`. settings: attributes of the trainer other than `BASE`."""
    trainer = trl(*where)
    mask, tool = masks()
    metrics = {"train": defaultdict(list)}
    entropy = torch.zeros_like(now) if entropy is None else entropy
    stand_in = SimpleNamespace(
        **{**BASE, "args": SimpleNamespace(**ARGS), **settings},
        loss_type=loss_type,
        _metrics=metrics,
        _get_per_token_logps_and_entropies=lambda *a, **k: (now, entropy, None),
    )
    for name in ("get_off_policy_mask", "get_gamma_weights"):
        setattr(stand_in, name, getattr(trl(*GRPO), name))
    stand_in.get_high_entropy_mask = lambda *a: trl(*GRPO).get_high_entropy_mask(stand_in, *a)
    prompt = torch.ones(len(LENGTHS), 3, dtype=torch.long)
    ratio = (values["old_logprobs"] - values["sampler_logprobs"]).exp().clamp(max=cap) if weight is None else weight
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": mask,
        "completion_mask": mask,
        "tool_mask": tool,
        "advantages": ADVANTAGES,
        "old_per_token_logps": values["old_logprobs"],
        "importance_sampling_ratio": torch.where((mask * tool).bool(), ratio, 1),
        "sampling_per_token_logps": values["sampler_logprobs"],
        "ref_per_token_logps": values["ref_logprobs"],
        "num_items_in_batch": (mask * tool).sum(),
    }
    if where == RLOO:
        inputs |= {"completion_mask": mask * tool, "old_logps": (values["old_logprobs"] * mask * tool).sum(1)}
    return trainer._compute_loss(stand_in, None, inputs), metrics["train"]


def our_loss(
    loss: Loss,
    now: Tensor,
    values: dict[str, Tensor],
    aggregation: Aggregation,
    entropy: Tensor | None = None,
    **inputs: float,
) -> tuple[Tensor, dict[str, float]]:
    """Our loss over several micro-batches, and what it logs."""
    total, metrics = torch.zeros((), dtype=torch.float64), Metrics()
    batches, cells = packed(values, aggregation)
    assert len(batches) > 1
    for batch, cell in zip(batches, cells, strict=True):
        batch = replace(
            batch, entropy=None if entropy is None else entropy.flatten()[cell], inputs=StepInputs(**inputs)
        )
        value, stats = loss(now.flatten()[cell], batch)
        total = total + value
        metrics.add(stats)
    return total, metrics.values()


def same(
    ours: tuple[Tensor, Any], theirs: tuple[Tensor, Any], a: Tensor, b: Tensor, metrics: Sequence[str] = ()
) -> None:
    """Loss, gradient to the leaves a and b, and metrics of the two libraries are equal."""
    ours[0].backward()
    theirs[0].backward()
    assert a.grad is not None and b.grad is not None and b.grad.abs().max() > 1e-2
    assert ours[0].item() == pytest.approx(theirs[0].item(), abs=1e-6)
    assert (a.grad - b.grad).abs().max() < 1e-6
    for name in metrics:
        assert ours[1][name] == pytest.approx(theirs[1][name][0], abs=1e-6), name


def grids() -> tuple[Tensor, dict[str, Tensor]]:
    """now, and the three others: now - old spread over +-0.5, old - sampler over +-1, now - ref over +-0.8."""
    g = torch.Generator().manual_seed(3)

    def spread(size: float) -> Tensor:
        return (torch.rand(len(LENGTHS), max(LENGTHS), generator=g, dtype=torch.float64) * 2 - 1) * size

    now = -1.5 + spread(1.0)
    old = now - spread(0.5)
    return now, {"old_logprobs": old, "sampler_logprobs": old - spread(1.0), "ref_logprobs": now - spread(0.8)}


CLIP = [f"clip_ratio/{name}" for name in ("low_mean", "high_mean", "region_mean", "low_min", "high_max")]


@pytest.mark.parametrize(
    ("beta", "bias", "kind"), [(0.0, False, "k3_ratio"), (0.3, True, "k3_ratio"), (0.3, False, "forward")]
)
@pytest.mark.parametrize(
    ("loss_type", "aggregation"),
    [("dapo", "token_mean"), ("bnpo", "token_mean"), ("grpo", "sequence_mean"), ("dr_grpo", "constant")],
)
@pytest.mark.parametrize("correction", ["decoupled", "none", "bypass"])
def test_grpo_equals_trl(
    loss_type: str, aggregation: Aggregation, beta: float, bias: bool, kind: Any, correction: Any
) -> None:
    """Several updates: the ratio is against old. bnpo's mean is over a micro-batch; TRL gets the step as one."""
    now, values = grids()
    if correction == "bypass":
        values["old_logprobs"] = values["sampler_logprobs"] = now + 0.6 * (values["old_logprobs"] - now)
    elif correction == "none":
        values["sampler_logprobs"] = values["old_logprobs"]
    cfg = Grpo(clip_high=0.28, kl_coef=beta, kl=kind, correction=correction)
    args = SimpleNamespace(**{**ARGS, "use_bias_correction_kl": bias})
    a, b = now.clone().requires_grad_(), now.clone().requires_grad_()
    theirs = trl_loss(b, values, loss_type, beta=beta, args=args)
    if correction == "none":
        values["sampler_logprobs"] = values["old_logprobs"] - 0.7
    assert min(theirs[1][name][0] for name in CLIP[:3]) > 0
    same(our_loss(cfg, a, values, aggregation), theirs, a, b, [*CLIP, *(["kl"] if beta and not bias else [])])


@pytest.mark.parametrize("delta", [1.3, 1.4])
def test_two_sided_clipping_equals_trls(delta: float) -> None:
    now, values = grids()
    a, b = now.clone().requires_grad_(), now.clone().requires_grad_()
    theirs = trl_loss(b, values, "dapo", args=SimpleNamespace(**{**ARGS, "delta": delta}))
    without = trl_loss(now, values, "dapo")[0]
    assert abs(theirs[0].item() - without.item()) > 1e-3
    cfg = Grpo(clip_high=0.28, delta=delta, correction="decoupled")
    same(our_loss(cfg, a, values, "token_mean"), theirs, a, b)


def drifting() -> tuple[Tensor, dict[str, Tensor]]:
    """Grids whose sequences drift apart, so that their mean ratios are spread and not only their tokens'."""
    now, values = grids()
    drift = torch.tensor([0.4, -0.4, 0.1, -0.3, 0.0, 0.3, 0.35, -0.35], dtype=torch.float64)[:, None]
    return now, {**values, "old_logprobs": now - 0.2 * (now - values["old_logprobs"]) - drift}


@pytest.mark.parametrize("form", ["token", "sequence"])
@pytest.mark.parametrize(
    ("loss_type", "aggregation"), [("grpo", "sequence_mean"), ("dapo", "token_mean"), ("luspo", "sequence_sum")]
)
def test_gspo_and_luspo_equal_trls_sequence_level(loss_type: str, aggregation: Aggregation, form: Any) -> None:
    """Both forms, with some sequences clipped on each side; without a correction, which TRL applies to neither form."""
    now, values = drifting()
    values["sampler_logprobs"] = values["old_logprobs"]
    a, b = now.clone().requires_grad_(), now.clone().requires_grad_()
    theirs = trl_loss(b, values, loss_type, importance_sampling_level="sequence")
    ours = our_loss(Gspo(clip_low=0.2, clip_high=0.28, form=form, correction="none"), a, values, aggregation)
    for metrics in ({k: [v] for k, v in ours[1].items()}, theirs[1]):
        assert min(metrics["clip_ratio/low_mean"][0], metrics["clip_ratio/high_mean"][0]) > 0
    same(ours, theirs, a, b)


def test_cispo_equals_trl() -> None:
    now, values = grids()
    a, b = now.clone().requires_grad_(), now.clone().requires_grad_()
    theirs = trl_loss(b, values, "cispo", epsilon_high=1.2)
    assert 0 < theirs[1]["cispo_clip_ratio"][0] < 1
    cfg = Cispo(clip_max=1.2, correction="decoupled")
    same(our_loss(cfg, a, values, "token_mean"), theirs, a, b, ["cispo_clip_ratio"])


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_sapo_equals_trl(beta: float) -> None:
    now, values = grids()
    a, b = now.clone().requires_grad_(), now.clone().requires_grad_()
    args = {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.3, "use_bias_correction_kl": True}
    theirs = trl_loss(b, values, "sapo", beta=beta, args=SimpleNamespace(**{**ARGS, **args}))
    cfg = Sapo(temperature_neg=1.3, kl_coef=beta, correction="decoupled")
    same(our_loss(cfg, a, values, "sequence_mean"), theirs, a, b)


def test_vespo_equals_trl() -> None:
    """TRL's W is policy over old times old over sampler, which is ours against the sampler."""
    now, values = grids()
    a, b = now.clone().requires_grad_(), now.clone().requires_grad_()
    names = {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
    theirs = trl_loss(b, values, "vespo", cap=math.inf, args=SimpleNamespace(**{**ARGS, **names}))
    same(our_loss(Vespo(), a, values, "token_mean"), theirs, a, b)


def test_gmpo_equals_trl() -> None:
    now, values = grids()
    a, b = now.clone().requires_grad_(), now.clone().requires_grad_()
    theirs = trl_loss(b, values, "gmpo", where=("experimental.gmpo.gmpo_trainer", "GMPOTrainer"), epsilon_high=0.28)
    cfg = Gmpo(clip_low=0.2, clip_high=0.28, correction="none")
    assert min(theirs[1][name][0] for name in CLIP[:3]) > 0
    ours = our_loss(cfg, a, values, "sequence_mean")
    # An empty completion has ratio 1 there, a constant -A / N in the value; here no token has it.
    same((ours[0] - ADVANTAGES[4] / len(LENGTHS), ours[1]), theirs, a, b, CLIP)


def test_rloo_equals_trl() -> None:
    now, values = drifting()
    values["old_logprobs"] = now - 0.5 * (now - values["old_logprobs"])
    a, b = now.clone().requires_grad_(), now.clone().requires_grad_()
    theirs = trl_loss(b, values, "rloo", where=RLOO)
    assert theirs[1]["clip_ratio/low_mean"][0] > 0 and 0 < theirs[1]["clip_ratio/high_mean"][0] < 1
    ours = our_loss(Rloo(clip_high=0.28, correction="none"), a, values, "sequence_sum")
    same((ours[0] - ADVANTAGES[4] / len(LENGTHS), ours[1]), theirs, a, b)  # as above


def test_off_policy_sequence_masking_equals_trl() -> None:
    now, values = grids()
    a, b = now.clone().requires_grad_(), now.clone().requires_grad_()
    theirs = trl_loss(b, values, "dapo", off_policy_mask_threshold=0.02)
    ours = our_loss(Grpo(clip_high=0.28, correction="decoupled", off_policy_limit=0.02), a, values, "token_mean")
    assert 0 < ours[1]["sampling/masked_ratio"] < 0.6
    same(ours, theirs, a, b)


@pytest.mark.parametrize(
    ("mode", "low", "high"),
    [
        ("token_truncate", None, 2.0),
        ("token_truncate", 0.5, 1.5),
        ("token_mask", 0.6, 1.6),
        ("sequence_truncate", None, 1.5),
        ("sequence_mask", None, 2.0),
        ("sequence_mask", 0.3, 2.0),
    ],
)
def test_the_correction_weights_equal_trls(mode: Any, low: float | None, high: float) -> None:
    now, values = grids()
    mask, tool = masks()
    stand_in = SimpleNamespace(
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )
    names = {
        "self": stand_in,
        "completion_mask": mask,
        "tool_mask": tool,
        "old_per_token_logps": values["old_logprobs"],
        "sampling_per_token_logps": values["sampler_logprobs"],
    }
    condition = "self.use_vllm and self.vllm_importance_sampling_correction"
    where = (*GRPO, "_generate_and_score_completions", condition, "vllm_importance_sampling_ratio")
    weight = run_block(*where, names).expand_as(now)
    assert weight[(mask * tool).bool()].unique().numel() > 3
    a, b = now.clone().requires_grad_(), now.clone().requires_grad_()
    theirs = trl_loss(b, values, "dapo", weight=weight)
    cfg = Grpo(
        clip_high=0.28, correction="decoupled", correction_weight=mode, correction_floor=low or 0.0, correction_cap=high
    )
    same(our_loss(cfg, a, values, "token_mean"), theirs, a, b)


def test_entropy_bonus_and_quantile_mask_equal_trl() -> None:
    now, values = grids()
    g = torch.Generator().manual_seed(5)
    entropy = torch.rand(now.shape, generator=g).double()
    batches, cells = packed(values, "token_mean")
    at = dict(zip(map(id, batches), cells, strict=True))
    policy = SimpleNamespace(entropy=lambda batch: entropy.flatten()[at[id(batch)]])
    floor = PackedStep(policy, PackPlan("token_mean", 1, 1, 1.0), [], batches).entropy_quantile(0.8)  # type: ignore[arg-type]
    for share, coef in ((0.2, 0.0), (1.0, 0.3)):
        a, b = (x.clone().requires_grad_() for x in (now, now))
        e, f = (x.clone().requires_grad_() for x in (entropy, entropy))
        theirs = trl_loss(
            b, values, "dapo", entropy=f, top_entropy_quantile=share, _entropy_bonus_enabled=coef > 0, entropy_coef=coef
        )
        cfg = Grpo(clip_high=0.28, correction="decoupled", entropy_coef=coef, entropy_share=share)
        same(our_loss(cfg, a, values, "token_mean", e, entropy_floor=floor), theirs, a, b, ["policy_loss"] * bool(coef))
        if coef:
            assert e.grad is not None and f.grad is not None
            assert (e.grad - f.grad).abs().max() < 1e-6 < f.grad.abs().max()


def test_sft_equals_transformers_cross_entropy() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss, fixed_cross_entropy

    # 16 trained tokens: 1 / 16 is exact in the float32 of `batch.weight`, so 1e-12 can be asked of the loss.
    lengths, vocab, longest = (6, 3, 7), 11, 10
    made = [
        Rollout(
            Prompt((1, 2, 3)[: 3 - i], {}, i),
            tuple((i + 2 * t) % vocab for t in range(n)),
            (True,) * n,
            None,
            "",
            "stop",
            0,
            -1,
            0,
        )
        for i, n in enumerate(lengths)
    ]
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, longest, vocab, generator=g, dtype=torch.float64)
    labels = torch.full((3, longest), -100)
    for i, rollout in enumerate(made):
        start = len(rollout.prompt.ids)
        labels[i, start : start + lengths[i]] = torch.tensor(rollout.completion_ids)
    theirs = logits.clone().requires_grad_()
    want = fixed_cross_entropy(theirs[:, :-1].reshape(-1, vocab), labels[:, 1:].reshape(-1))
    want.backward()

    ours = logits.clone().requires_grad_()
    plan = PackPlan("token_mean", 12, 7, 1.0)
    total = torch.zeros((), dtype=torch.float64)
    for batch in records.packed(made, plan, adv.identity(torch.ones(3), torch.arange(3))):
        row = torch.tensor(records.rows(batch, made))[batch.seq_ids]
        log_p = ours[row, (batch.position_ids - 1).clamp(min=0)].log_softmax(-1)
        total = total + Sft()(log_p.gather(1, batch.input_ids[:, None]).squeeze(1), batch)[0]
    total.backward()
    assert ours.grad is not None and theirs.grad is not None
    assert total.item() == pytest.approx(want.item(), abs=1e-12)
    assert (ours.grad - theirs.grad).abs().max() < 1e-12 and theirs.grad.abs().max() > 1e-2
    # The function a model calls casts to float32 first.
    assert total.item() == pytest.approx(ForCausalLMLoss(logits, labels, vocab).item(), abs=1e-6)
