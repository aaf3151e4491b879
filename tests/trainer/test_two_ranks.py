"""A step over two gloo ranks: gradients of every loss, estimators over the batch and what `prepare` gives."""

from __future__ import annotations

import faulthandler
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import records
import torch
from losses import LOSSES, PAIRS, Toy, batches_of, filled_step, rows_of, step
from torch import Tensor

from rlft import dist
from rlft.algos.advantages import ESTIMATORS
from rlft.algos.algorithm import estimator_of
from rlft.algos.losses.kto import Kto, mismatched
from rlft.batch import count, group_ids
from rlft.trainer.metrics import Metrics
from rlft.trainer.prepare import PackedStep
from rlft.types import PackPlan, Rollout, Stat, Stats

REWARDS = torch.tensor([1.0, 0.0, 0.3, float("nan"), 2.0, 2.0, 0.5, 0.0, 0.7, 0.7, 0.7, 0.7])
GROUPS = torch.arange(3).repeat_interleave(4)


def advantages(name: str, rows: slice) -> Tensor:
    rewards, parts = REWARDS[rows], torch.stack([REWARDS[rows], REWARDS[rows] ** 2], 1).double()
    return estimator_of(name)(
        rewards,
        GROUPS[rows] - GROUPS[rows][0],
        lengths=torch.arange(1, 13)[rows],
        parts=parts,
        weights=torch.tensor([1.0, 0.5], dtype=torch.float64),
    )


class Gains:
    """What `Kto.prepare` asks for: log-ratios that depend on prompt and completion."""

    def __init__(self, rollouts: list[Rollout]) -> None:
        self.rollouts = rollouts

    def log_ratios(self, rollouts: list[Rollout]) -> Tensor:
        made = [0.3 + r.prompt.index - 0.1 * sum(r.completion_ids) for r in rollouts]
        return torch.tensor(made, dtype=torch.float64)

    def sum(self, values: Tensor) -> Tensor:
        return dist.sum_tensor(values)


def quantile(rows: slice) -> float:
    batches = batches_of(step()[rows])
    policy: Any = SimpleNamespace(entropy=lambda batch: (batch.input_ids * 0.37).sin().abs())
    return PackedStep(policy, PackPlan("token_mean", 1, 1, 1.0), [], batches).entropy_quantile(0.8)


def micro_batches() -> list[Stats]:
    """Four micro-batches, of which each rank has two: only the second rank's have "kl", and one of them has a nan."""
    values = torch.tensor([[0.1, 0.7, 2.5], [-1.0, 3.0, 0.3], [0.2, 0.2, 9.0], [4.0, -7.0, 1.1]])
    masks = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]]).bool()
    made = [
        {
            "entropy": Stat.mean(row, mask),
            "loss": Stat("sum", row.double().sum()),
            "low": Stat("min", row.min()),
            "high": Stat("max", row.max()),
            "broken": Stat("max", math.nan if i == 2 else 1.0),
            "nothing": Stat.mean(row, mask & False),
        }
        for i, (row, mask) in enumerate(zip(values, masks, strict=True))
    ]
    made[2]["kl"] = Stat("mean", 0.5, 4.0)
    return made


def metrics_of(micro: list[Stats]) -> dict[str, float]:
    metrics = Metrics()
    for stats in micro:
        metrics.add(stats)
    return metrics.reduce().values()


def results(rank: int | None) -> dict[str, Any]:
    """Of one rank, half of the rows; of None, all of them in one process."""
    toy, found = Toy(), {}
    for name in LOSSES:
        pair = name in PAIRS
        made, values = rows_of(pair)
        rows = slice(0, 8) if rank is None else slice(4 * rank, 4 * rank + 4)
        if rank is None:
            batches = filled_step(pair)
        else:
            counts = dist.sum_counts(count(records.groups(made[rows])))
            assert counts == count(records.groups(made))
            own = batches_of(made[rows], "token_mean", 9, True, values[rows], pair, counts)
            batches = [toy.filled(batch) for batch in own]
        found[name] = dist.sum_tensor(toy.gradient(batches, name)[1])
    rows = slice(0, 12) if rank is None else (slice(0, 4), slice(4, 12))[rank]
    found |= {name: advantages(name, rows) for name in ESTIMATORS if name != "max_rl"}
    half = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    found["entropy_floor"] = quantile(half)
    made = step(group=2)
    assert len(set(group_ids(made).tolist())) == 4
    # Each rank goes round its own groups: what is summed and counted over both is all that z0 needs.
    look = Gains(made if rank is None else made[half])
    gains = mismatched(look.rollouts)
    found["gains"] = look.log_ratios(gains)
    found["metrics"] = metrics_of(micro_batches()[slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)])
    found["z0"] = Kto().prepare(look).z0
    return found


def _rank(rank: int, folder: str) -> None:
    """One of two processes; one that hangs says where and ends."""
    faulthandler.dump_traceback_later(120, exit=True)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(results(rank), f"{folder}/{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


def test_two_ranks_give_what_one_process_gives(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="forkserver")
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    alone = results(None)
    for name in LOSSES:
        assert alone[name].abs().max() > 1e-3, name
        assert torch.equal(first[name], second[name]) and (first[name] - alone[name]).abs().max() < 1e-12, name
    for name in set(ESTIMATORS) - {"max_rl"}:
        assert (torch.cat([first[name], second[name]]) - alone[name]).abs().max() < 1e-6, name
    assert first["entropy_floor"] == second["entropy_floor"] == alone["entropy_floor"] > 0
    assert repr(first["metrics"]) == repr(second["metrics"])  # as text, since nan is not nan
    assert first["metrics"] == pytest.approx(alone["metrics"], rel=1e-15, nan_ok=True)
    assert {name: round(value, 6) for name, value in first["metrics"].items() if name != "broken"} == {
        "entropy": 0.533333,  # (0.1 + 0.7 + 0.2 + 0.2 + 9 - 7) / 6: the mean of the ranks' means would be 0.5
        "loss": 13.1,
        "low": -7.0,
        "high": 9.0,
        "kl": 0.125,
    }
    assert math.isnan(first["metrics"]["broken"])
    gains = torch.cat([first["gains"], second["gains"]])
    assert first["z0"] == second["z0"] == pytest.approx(float(gains.mean())) and first["z0"] > 0
