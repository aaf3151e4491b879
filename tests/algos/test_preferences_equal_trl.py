"""Preference losses and dft against TRL 1.16's own code: values, gradients and metrics, on packed micro-batches."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import records
import torch
from torch import Tensor
from trl_code import trl

from rlft.algos.loss import Loss
from rlft.algos.losses.apo import Apo
from rlft.algos.losses.cpo import Cpo
from rlft.algos.losses.dft import Dft
from rlft.algos.losses.dpo import Dpo
from rlft.algos.losses.exo import Exo
from rlft.algos.losses.grpo import Grpo
from rlft.algos.losses.hinge import Hinge
from rlft.algos.losses.ipo import Ipo
from rlft.algos.losses.kto import Kto
from rlft.algos.losses.nca import Nca
from rlft.algos.losses.orpo import Orpo
from rlft.algos.losses.robust_dpo import RobustDpo
from rlft.algos.losses.rpo import Rpo
from rlft.algos.losses.simpo import Simpo
from rlft.algos.losses.sppo import Sppo
from rlft.trainer.metrics import Metrics
from rlft.types import Aggregation, Batch, PackPlan, Prompt, Rollout, StepInputs

CPO = ("experimental.cpo.cpo_trainer", "CPOTrainer")
LENGTHS = ((5, 2), (5, 7), (5, 4), (5, 6))
"""Tokens of the chosen and the rejected side of each pair. TRL's NLL is over the tokens of a micro-batch, ours is the
mean of the pairs': they are equal where the chosen sides are of one length."""
LONGEST, PAIRS = 7, len(LENGTHS)
ORDER = [*range(0, 2 * PAIRS, 2), *range(1, 2 * PAIRS, 2)]
"""TRL's rows: chosen sides, then rejected ones."""
MASK = (torch.arange(LONGEST)[None] < torch.tensor([n for pair in LENGTHS for n in pair])[:, None]).long()
SAME = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


def packed(values: dict[str, Tensor], whole: bool, aggregation: Aggregation) -> list[tuple[Batch, Tensor]]:
    """Micro-batches with the log-probs in `values` ([8, 7] each), and which cell of that grid each token is."""
    made = [
        Rollout(Prompt(tuple(range(1, 3 + p)), {}, p), tuple(range(9, 9 + n)), (True,) * n, None, "", "stop", s, -1, 0)
        for p, lengths in enumerate(LENGTHS)
        for s, n in enumerate(lengths)
    ]
    plan = PackPlan(aggregation, 25, LONGEST, 1.0, whole_groups=whole)
    found = []
    for batch in records.packed(made, plan, torch.tensor([1.0, -1.0] * PAIRS)):
        own = [s for s in range(len(batch.prefix)) if batch.group_ids[s] >= 0]
        cells = torch.zeros(len(batch.input_ids), dtype=torch.long)
        for s, row in zip(own, records.rows(batch, made), strict=True):
            mine = ((batch.seq_ids == s) & batch.train_mask).nonzero().squeeze(1)
            cells[mine] = row * LONGEST + torch.arange(len(mine))
        found.append((replace(batch, **{name: grid.flatten()[cells] for name, grid in values.items()}), cells))
    return found


def grids() -> tuple[Tensor, Tensor]:
    """now and ref, apart by up to 1 nat, so that margins have both signs."""
    g = torch.Generator().manual_seed(1)
    now = -2 + torch.rand(2 * PAIRS, LONGEST, generator=g, dtype=torch.float64)
    return now, now + (torch.rand(now.shape, generator=g, dtype=torch.float64) - 0.5) * 2


def ours(loss: Loss, now: Tensor, ref: Tensor, **inputs: float) -> tuple[Tensor, dict[str, float]]:
    total, metrics = torch.zeros((), dtype=torch.float64), Metrics()
    values = {"ref_logprobs": ref} if loss.needs_reference else {}
    batches = packed(values, loss.whole_groups, loss.aggregation)
    assert len(batches) > 1
    for batch, cells in batches:
        value, stats = loss(now.flatten()[cells], replace(batch, inputs=StepInputs(**inputs)))
        total = total + value
        metrics.add(stats)
    return total, metrics.values()


def check(
    got: tuple[Tensor, dict[str, float]], want: tuple[Tensor, dict[str, Any]], a: Tensor, b: Tensor, names: int
) -> None:
    """Loss, gradients and every metric of ours that TRL has, at least `names` of them, are equal."""
    got[0].backward()
    want[0].backward()
    assert a.grad is not None and b.grad is not None and b.grad.abs().max() > 1e-3
    assert got[0].item() == pytest.approx(want[0].item(), abs=1e-6)
    assert (a.grad - b.grad).abs().max() < 1e-6
    shared = got[1].keys() & want[1].keys()
    assert len(shared) >= names
    for name in shared:
        value = want[1][name][0] if isinstance(want[1][name], list) else want[1][name]
        assert got[1][name] == pytest.approx(value, abs=1e-6), name


def outputs_of(grid: Tensor, mask: Tensor) -> SimpleNamespace:
    """What TRL's fused head returns, as far as the losses read it."""
    logps = torch.where(mask.bool(), grid, 0)
    zeros = torch.zeros_like(logps)
    return SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), label_mask=mask)


def dpo_of(kinds: list[str], weights: list[float], now: Tensor, ref: Tensor, **settings: Any) -> tuple[Tensor, Any]:
    """TRL's DPOTrainer on the grids."""
    mask = MASK[ORDER]
    full = torch.cat([torch.zeros(len(now), 1, dtype=torch.long), mask], 1)  # a column that the shift removes
    metrics = {"train": defaultdict(list)}
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SAME,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=kinds,
        loss_weights=weights,
        **{"beta": 0.3, "label_smoothing": 0.0, **settings},
        use_weighting=False,
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
    )
    sums = torch.where(mask.bool(), ref[ORDER], 0).sum(1)
    # TRL counts the mask before its shift for IPO's mean: its own column is 0.
    inputs = {
        "input_ids": full,
        "attention_mask": full,
        "completion_mask": full,
        "ref_chosen_logps": sums[:PAIRS],
        "ref_rejected_logps": sums[PAIRS:],
    }
    outputs = outputs_of(now[ORDER], mask)
    loss = trl("trainer.dpo_trainer", "DPOTrainer")._compute_loss(stand_in, lambda **_: outputs, inputs, False)
    return loss, metrics["train"]


@pytest.mark.parametrize(
    ("loss", "kinds", "weights"),
    [
        (Dpo(beta=0.3), ["sigmoid"], [1.0]),
        (Ipo(beta=0.3), ["ipo"], [1.0]),
        (RobustDpo(beta=0.3, label_smoothing=0.2), ["robust"], [1.0]),
        (Hinge(beta=0.3), ["hinge"], [1.0]),
        (Apo(beta=0.3), ["apo_zero"], [1.0]),
        (Apo(beta=0.3, variant="down"), ["apo_down"], [1.0]),
        (Exo(beta=0.3, label_smoothing=0.2), ["exo_pair"], [1.0]),
        (Nca(beta=0.3), ["nca_pair"], [1.0]),
        (Sppo(beta=0.3), ["sppo_hard"], [1.0]),
        (Rpo(beta=0.3, nll_coef=0.7), ["sigmoid", "sft"], [1.0, 0.7]),
    ],
)
def test_losses_with_a_reference_equal_trls_dpo(loss: Loss, kinds: list[str], weights: Any) -> None:
    now, ref = grids()
    a, b = now.clone().requires_grad_(), now.clone().requires_grad_()
    smoothing = getattr(loss, "label_smoothing", 0.0)
    got = ours(loss, a, ref)
    assert 0 < got[1]["rewards/accuracies"] < 1
    check(got, dpo_of(kinds, weights, b, ref, label_smoothing=smoothing), a, b, 6)


def free_of(module: str, owner: str, now: Tensor, average: bool, **settings: Any) -> tuple[Tensor, Any]:
    """TRL's CPO and ORPO trainers on the grid: their loss with the log-probs that their forward would give."""
    trainer = trl(module, owner)
    sums = torch.where(MASK.bool(), now, 0).sum(1)
    logps = sums / MASK.sum(1) if average else sums
    nll = -sums[::2].sum() / MASK[::2].sum()
    nothing = torch.zeros(1, dtype=torch.float64)
    stand_in = SimpleNamespace(
        concatenated_forward=lambda *_: (logps[::2], logps[1::2], nothing, nothing, nll),
        aux_loss_enabled=False,
        accelerator=SAME,
        **{"label_smoothing": 0.0, "alpha": 0.0, "cpo_alpha": 1.0, **settings},
    )
    for name in ("cpo_loss", "odds_ratio_loss"):
        if hasattr(trainer, name):
            setattr(stand_in, name, getattr(trainer, name).__get__(stand_in))
    return trainer.get_batch_loss_metrics(stand_in, None, {})


@pytest.mark.parametrize(
    ("loss", "where", "average", "settings"),
    [
        (
            Cpo(beta=0.3, label_smoothing=0.1, nll_coef=0.6),
            CPO,
            False,
            {"loss_type": "sigmoid", "beta": 0.3, "label_smoothing": 0.1, "cpo_alpha": 0.6},
        ),
        (
            Simpo(beta=2.0, gamma=0.7),
            CPO,
            True,
            {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "cpo_alpha": 0.0},
        ),
        (Orpo(beta=0.4), ("experimental.orpo.orpo_trainer", "ORPOTrainer"), True, {"beta": 0.4}),
    ],
)
def test_losses_without_a_reference_equal_trls(
    loss: Loss, where: tuple[str, str], average: bool, settings: dict[str, Any]
) -> None:
    now, ref = grids()
    a, b = now.clone().requires_grad_(), now.clone().requires_grad_()
    got, want = ours(loss, a, ref), free_of(*where, b, average, **settings)
    if average:  # TRL logs the means as logps there, ours are sums for every loss
        want[1].pop("logps/chosen"), want[1].pop("logps/rejected")
    check(got, want, a, b, 4)


@pytest.mark.parametrize("name", ["orpo", "cpo"])
def test_the_nll_differs_from_trls_as_the_docstrings_say(name: str) -> None:
    """Two pairs of unequal lengths through a real model: TRL's is the mean over the tokens of the micro-batch (for orpo
    of prompt and completion), ours that of the pairs' means."""
    from tiny import tiny_model

    model = tiny_model(torch.float64)
    rows = [((11, 12, 13), (14, 15)), ((21, 22), (23, 24, 25, 26, 27))]
    longest = max(len(p) + len(c) for p, c in rows)

    def grid(of: Any, fill: int) -> Tensor:
        return torch.tensor([of(p, c) + [fill] * (longest - len(p) - len(c)) for p, c in rows])

    sides = {
        "input_ids": grid(lambda p, c: [*p, *c], 0),
        "attention_mask": grid(lambda p, c: [1] * len(p + c), 0),
        "labels": grid(lambda p, c: [-100] * len(p) + [*c], -100),
    }
    batch = {f"{side}_{key}": value for side in ("chosen", "rejected") for key, value in sides.items()}
    trainer = trl(f"experimental.{name}.{name}_trainer", f"{name.upper()}Trainer")
    stand_in = SimpleNamespace(
        is_encoder_decoder=False,
        padding_value=0,
        pad_token_id=0,
        accelerator=SAME,
        aux_loss_enabled=False,
        cpo_alpha=1.0,
        loss_type="sigmoid",
        concatenated_inputs=trainer.concatenated_inputs,
        get_batch_logps=trainer.get_batch_logps,
    )
    with torch.no_grad():
        theirs = trainer.concatenated_forward(stand_in, model, batch)[4]
        log_p = model(sides["input_ids"], attention_mask=sides["attention_mask"]).logits.log_softmax(-1)
    per_row = [
        torch.stack([log_p[i, t - 1, (p + c)[t]] for t in range(1, len(p + c))]) for i, (p, c) in enumerate(rows)
    ]
    completions = [values[len(p) - 1 :] for values, (p, _) in zip(per_row, rows, strict=True)]
    said = -torch.cat(per_row if name == "orpo" else completions).mean()
    ours_ = -torch.stack([values.mean() for values in completions]).mean()
    assert theirs.item() == pytest.approx(said.item(), abs=1e-6) and abs(said - ours_) > 1e-2
    made = [
        Rollout(Prompt(p, {}, i), c, (True,) * len(c), None, "", "stop", s, -1, 0)
        for i, (p, c) in enumerate(rows)
        for s in (0, 1)
    ]
    plan = PackPlan("sequence_sum", 1000, longest, 1.0, whole_groups=True)
    (packed_,) = records.packed(made, plan, torch.tensor([1.0, -1.0] * 2))
    logprobs = torch.zeros(len(packed_.input_ids), dtype=torch.float64)
    own = [s for s in range(len(packed_.prefix)) if packed_.group_ids[s] >= 0]
    for s, row in zip(own, records.rows(packed_, made), strict=True):
        logprobs[(packed_.seq_ids == s) & packed_.train_mask] = completions[row // 2]
    loss: Loss = {"orpo": Orpo(), "cpo": Cpo()}[name]
    metrics = Metrics()
    metrics.add(loss(logprobs, packed_)[1])
    assert metrics.values()["nll_loss"] == pytest.approx(ours_.item(), abs=1e-6)


def test_trls_correction_for_the_sampler_is_by_default_what_the_docs_say() -> None:
    fields = trl("trainer.grpo_config", "GRPOConfig").__dataclass_fields__
    found = {name: fields[f"vllm_importance_sampling_{name}"].default for name in ("mode", "clip_max", "clip_min")}
    assert found == {"mode": "sequence_mask", "clip_max": 3.0, "clip_min": None}
    ours_ = Grpo()
    assert (ours_.correction_weight, ours_.correction_cap, ours_.correction_floor) == ("token_truncate", 2.0, 0.0)


@pytest.mark.parametrize("z0", [0.0, 0.8])
def test_kto_equals_trl(z0: float) -> None:
    """The same z0 on both sides; how ours is made is in test_prepare."""
    now, ref = grids()
    a, b = now.clone().requires_grad_(), now.clone().requires_grad_()
    labels = torch.tensor([True, False] * PAIRS)
    full = torch.cat([torch.zeros(len(now), 1, dtype=torch.long), MASK], 1)
    metrics = {"train": defaultdict(list)}
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SAME,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        beta=0.3,
        loss_type="kto",
        desirable_weight=1.1,
        undesirable_weight=0.9,
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
        _compute_kl_logps=lambda *_: torch.tensor([z0 - 1, z0 + 1.0]),
    )
    inputs = {
        "input_ids": full,
        "attention_mask": full,
        "completion_mask": full,
        "label": labels,
        "ref_logps": torch.where(MASK.bool(), ref, 0).sum(1),
        "ref_KL_logps": torch.zeros(2),
    }
    outputs = outputs_of(b, MASK)
    want = trl("trainer.kto_trainer", "KTOTrainer")._compute_loss(stand_in, lambda **_: outputs, inputs, False)
    got = ours(Kto(beta=0.3, desirable_weight=1.1, undesirable_weight=0.9), a, ref, z0=z0)
    check(got, (want, metrics["train"]), a, b, 5)


def test_dft_equals_trl() -> None:
    """TRL's formula is inside a method that runs the model: what it adds to the cross-entropy is two lines of it."""
    now, _ = grids()
    a, b = now.clone().requires_grad_(), now.clone().requires_grad_()
    outputs = outputs_of(b, MASK)
    metrics = {"train": defaultdict(list)}
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        accelerator=SAME,
        _metrics=metrics,
        compute_loss_func=None,
        args=SimpleNamespace(loss_type="dft", label_smoothing_factor=0.0, average_tokens_across_devices=False),
    )
    want = dft_loss(stand_in, outputs)
    total = torch.zeros((), dtype=torch.float64)
    for batch, cells in packed({}, False, "token_mean"):
        batch = replace(batch, advantages=batch.advantages.abs())
        total = total + Dft()(a.flatten()[cells], batch)[0]
    check((total, {}), (want, {}), a, b, 0)


def dft_loss(stand_in: SimpleNamespace, outputs: SimpleNamespace) -> Tensor:
    """The lines of TRL's SFTTrainer.compute_loss from its log-probs to its loss."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(trl("trainer.sft_trainer", "SFTTrainer").compute_loss)))
    bodies = [getattr(node, part, None) for node in ast.walk(tree) for part in ("body", "orelse")]
    bodies = [body for body in bodies if isinstance(body, list)]
    first = "per_token_loss = -outputs.log_probs"
    ((body, start),) = [(body, i) for body in bodies for i, x in enumerate(body) if ast.unparse(x) == first]
    names: dict[str, Any] = {"outputs": outputs, "self": stand_in, "num_items_in_batch": None, "torch": torch}
    exec(compile(ast.Module(body=body[start : start + 4], type_ignores=[]), "trl", "exec"), names)
    return names["loss"]
