"""grpo against TRL 1.16's own loss code, sft against transformers' cross-entropy: values, gradients and metrics.

TRL's `GRPOTrainer._compute_loss` runs on a stand-in that holds its settings and gives it log-probs, so that ratios far
from 1, both clip sides, ragged lengths, an empty completion and corrections other than 1 are all in play.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_code import trl

from rlft.algos import advantages as adv
from rlft.algos import grpo, gspo, sft
from rlft.batch import count, pack
from rlft.types import Aggregation, Batch, PackPlan, Prompt, Rollout

LENGTHS = (5, 2, 7, 1, 0, 4, 3, 6)
MAX_LEN = 9
ADVANTAGES = torch.tensor([1.2, -0.7, 0.4, -1.1, 0.9, -0.3, 0.8, -1.5])


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
    plan = PackPlan((True,) * len(made), aggregation, 16, MAX_LEN, 1.0)
    batches, cells = [], []
    for batch in pack(made, ADVANTAGES, plan, count(made, plan)):
        own = [s for s in range(len(batch.prefix)) if batch.group_ids[s] >= 0]
        row = torch.tensor([batch.rows[own.index(s)] if s in own else 0 for s in batch.seq_ids.tolist()])
        cell = row * max(LENGTHS) + (batch.position_ids - 3).clamp(min=0)
        batches.append(replace(batch, **{name: grid.flatten()[cell].detach() for name, grid in values.items()}))
        cells.append(cell)
    return batches, cells


def trl_loss(
    now: Tensor, values: dict[str, Tensor], loss_type: str, cap: float, level: str = "token", **args: Any
) -> tuple[Tensor, Any]:
    """TRL's loss on the grid of log-probs, and its metrics."""
    GRPOTrainer = trl("trainer.grpo_trainer", "GRPOTrainer")

    made = step()
    mask, tool = torch.zeros(now.shape, dtype=torch.long), torch.ones(now.shape, dtype=torch.long)
    for i, rollout in enumerate(made):
        mask[i, : LENGTHS[i]] = 1
        tool[i, : LENGTHS[i]] = torch.tensor(rollout.completion_mask, dtype=torch.long)
    metrics = {"train": defaultdict(list)}
    stand_in = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (now, torch.zeros_like(now), None), aux_loss_enabled=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level=level,
        beta=args.get("beta", 0.0), epsilon_low=0.2, epsilon_high=0.28, loss_type=loss_type, use_vllm=True,
        vllm_importance_sampling_correction=True, current_gradient_accumulation_steps=1, max_completion_length=MAX_LEN,
        _entropy_bonus_enabled=False, _metrics=metrics, model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=args.get("bias", False)),
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
    )  # fmt: skip
    prompt = torch.ones(len(made), 3, dtype=torch.long)
    ratio = (values["old_logprobs"] - values["sampler_logprobs"]).exp().clamp(max=cap)
    inputs = {
        "prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": mask, "completion_mask": mask, "tool_mask": tool,
        "advantages": ADVANTAGES, "old_per_token_logps": values["old_logprobs"], "importance_sampling_ratio": ratio,
        "ref_per_token_logps": values["ref_logprobs"], "num_items_in_batch": (mask * tool).sum(),
    }  # fmt: skip
    return GRPOTrainer._compute_loss(stand_in, None, inputs), metrics["train"]  # type: ignore[arg-type]


def grids() -> tuple[Tensor, dict[str, Tensor]]:
    """now, and the three others: now - old spread over +-0.5, old - sampler over +-1, now - ref over +-0.8."""
    g = torch.Generator().manual_seed(3)

    def spread(size: float) -> Tensor:
        return (torch.rand(len(LENGTHS), max(LENGTHS), generator=g, dtype=torch.float64) * 2 - 1) * size

    now = -1.5 + spread(1.0)
    old = now - spread(0.5)
    return now, {"old_logprobs": old, "sampler_logprobs": old - spread(1.0), "ref_logprobs": now - spread(0.8)}


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
    cfg = grpo.Config(clip_high=0.28, kl_coef=beta, kl=kind, correction=correction, correction_cap=2.0)
    theirs = now.clone().requires_grad_()
    want, metrics = trl_loss(theirs, values, loss_type, 2.0, beta=beta, bias=bias)
    if correction == "none":
        values["sampler_logprobs"] = values["old_logprobs"] - 0.7
    want.backward()
    ours = now.clone().requires_grad_()
    batches, cells = packed(values, aggregation)
    assert len(batches) > 1
    total, sums = torch.zeros((), dtype=torch.float64), defaultdict(lambda: [0.0, 0.0])
    for batch, cell in zip(batches, cells, strict=True):
        loss, stats = grpo.loss(ours.flatten()[cell], batch, cfg)
        total = total + loss
        for name, stat in stats.items():
            sums[name][0] += float(stat.value)
            sums[name][1] += float(stat.count)
    total.backward()
    assert total.item() == pytest.approx(want.item(), abs=1e-6)
    assert ours.grad is not None and theirs.grad is not None
    assert theirs.grad.abs().max() > 1e-2
    assert (ours.grad - theirs.grad).abs().max() < 1e-6
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
        assert sums[name][0] / sums[name][1] == pytest.approx(metrics[name][0]) and metrics[name][0] > 0
    if beta and not bias:
        assert sums["kl"][0] / sums["kl"][1] == pytest.approx(metrics["kl"][0])


@pytest.mark.parametrize("form", ["token", "sequence"])
@pytest.mark.parametrize(("loss_type", "aggregation"), [("grpo", "sequence_mean"), ("dapo", "token_mean")])
def test_gspo_equals_trls_sequence_level(loss_type: str, aggregation: Aggregation, form: Any) -> None:
    """Both forms, with some sequences clipped on each side; without a correction, which TRL applies to neither form."""
    now, values = grids()
    # A drift per sequence, so that the means of the ratios are spread and not only the tokens'.
    drift = torch.tensor([0.4, -0.4, 0.1, -0.3, 0.0, 0.3, 0.35, -0.35], dtype=torch.float64)[:, None]
    values = {**values, "old_logprobs": now - 0.2 * (now - values["old_logprobs"]) - drift}
    values["sampler_logprobs"] = values["old_logprobs"]
    theirs = now.clone().requires_grad_()
    want, metrics = trl_loss(theirs, values, loss_type, 2.0, level="sequence")
    want.backward()
    ours = now.clone().requires_grad_()
    cfg = gspo.Config(clip_low=0.2, clip_high=0.28, form=form, correction="none")
    total = torch.zeros((), dtype=torch.float64)
    clipped: list[float] = [0.0, 0.0]
    for batch, cell in zip(*packed(values, aggregation), strict=True):
        loss, stats = gspo.loss(ours.flatten()[cell], batch, cfg)
        total = total + loss
        clipped = [
            c + float(stats[f"clip_ratio/{side}_mean"].value) for c, side in zip(clipped, ("low", "high"), strict=True)
        ]
    total.backward()
    assert ours.grad is not None and theirs.grad is not None
    assert total.item() == pytest.approx(want.item(), abs=1e-6)
    assert (ours.grad - theirs.grad).abs().max() < 1e-6 < theirs.grad.abs().max()
    assert min(clipped) > 0 and min(metrics["clip_ratio/low_mean"][0], metrics["clip_ratio/high_mean"][0]) > 0


def test_group_norm_and_the_logged_spread_equal_trl() -> None:
    nanstd = trl("trainer.utils", "nanstd")

    rewards = torch.tensor([[1.0, 0.0, 0.25, 1.0], [0.5, float("nan"), -2.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    want = (rewards - rewards.nanmean(dim=1, keepdim=True)) / (nanstd(rewards, dim=1)[:, None] + 1e-4)
    groups = torch.arange(3).repeat_interleave(4)
    assert adv.group_norm(rewards.flatten(), groups).tolist() == pytest.approx(
        want.nan_to_num(0).flatten().tolist(), abs=1e-6
    )
    assert adv.reward_std(rewards.flatten()) == pytest.approx(nanstd(rewards.flatten()).item(), abs=1e-6)
    assert adv.frac_zero_std(rewards.flatten(), groups) == pytest.approx(1 / 3)


def test_sft_equals_transformers_cross_entropy() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss, fixed_cross_entropy

    # 16 trained tokens: 1 / 16 is exact in the float32 of `batch.weight`, so 1e-12 can be asked of the loss.
    lengths, vocab, longest = (6, 3, 7), 11, 10
    made = [
        Rollout(Prompt((1, 2, 3)[: 3 - i], {}, i), tuple((i + 2 * t) % vocab for t in range(n)), (True,) * n, None, "",
                "stop", 0, -1, 0)
        for i, n in enumerate(lengths)
    ]  # fmt: skip
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
    plan = PackPlan((True,) * 3, "token_mean", 12, 7, 1.0)
    total = torch.zeros((), dtype=torch.float64)
    for batch in pack(made, adv.identity(torch.ones(3), torch.arange(3)), plan, count(made, plan)):
        row = torch.tensor(batch.rows)[batch.seq_ids]
        log_p = ours[row, (batch.position_ids - 1).clamp(min=0)].log_softmax(-1)
        total = total + sft.loss(log_p.gather(1, batch.input_ids[:, None]).squeeze(1), batch, sft.Config())[0]
    total.backward()
    assert ours.grad is not None and theirs.grad is not None
    assert total.item() == pytest.approx(want.item(), abs=1e-12)
    assert (ours.grad - theirs.grad).abs().max() < 1e-12 and theirs.grad.abs().max() > 1e-2
    # The function a model calls casts to float32 first.
    assert total.item() == pytest.approx(ForCausalLMLoss(logits, labels, vocab).item(), abs=1e-6)
