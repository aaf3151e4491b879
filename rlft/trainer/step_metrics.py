"""The numbers of one step under TRL's names: lengths, rewards' spread, times, tokens per second."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rlft.algos.advantages import frac_zero_std
from rlft.batch import group_ids
from rlft.trainer.optim import Update
from rlft.types import Batch, Rollout, Stat, Stats


class Clock:
    """Seconds per phase of a step."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of the block to `phase`."""
        before = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - before

    def values(self) -> dict[str, float]:
        """time/* metrics, step_time from the start of the step to now, and time/idle, which no phase took."""
        total = time.perf_counter() - self.start
        idle = max(0.0, total - sum(self.seconds.values()))
        return {f"time/{k}": v for k, v in self.seconds.items()} | {"time/idle": idle, "step_time": total}


def peak_memory(device: torch.device) -> dict[str, float]:
    """perf/peak_GiB: on a GPU the most that PyTorch held there since the last call; on a CPU the most that the process
    has held since it began. Empty where the system does not tell."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return {"perf/peak_GiB": peak / 2**30}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return {"perf/peak_GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


def batch_stats(loss: Tensor, logprobs: Tensor, entropy: Tensor, batch: Batch) -> Stats:
    """Loss and entropy of a micro-batch, and how many tokens have a log-prob or an entropy that is not finite.

    logprobs, entropy: [T], 0 where nothing is trained. The loss adds up: its weights hold the division.
    """
    broken = (~(logprobs.detach() + entropy.detach()).isfinite()).sum()
    return {
        "loss": Stat("sum", loss.detach()),
        "entropy": Stat.mean(entropy, batch.train_mask),
        "nonfinite_logprobs": Stat("sum", broken),
    }


def update_values(updates: Sequence[Update], values: dict[str, float]) -> dict[str, float]:
    """Loss and gradient norm as means over the updates of a step, and the last learning rate. values: the step's
    metrics, whose loss is the sum over its updates."""
    found = {"grad_norm": sum(u.grad_norm for u in updates) / len(updates), "learning_rate": updates[-1].learning_rate}
    return found | ({"loss": values["loss"] / len(updates)} if "loss" in values else {})


def rollout_values(rollouts: Sequence[Rollout], rewards: Tensor) -> dict[str, float]:
    """completions/* (lengths in tokens; "terminated" are those that were not cut), and the shares of groups with equal
    rewards and of invalid rewards. rewards: [N], nan where invalid."""
    lengths = [len(r.completion_ids) for r in rollouts]
    ended = [len(r.completion_ids) for r in rollouts if r.finish_reason == "stop"]
    values = {"completions/clipped_ratio": 1 - len(ended) / len(lengths)}
    for name, of in (("", lengths), ("terminated_", ended or [0])):
        values |= {
            f"completions/mean_{name}length": sum(of) / len(of),
            f"completions/min_{name}length": float(min(of)),
            f"completions/max_{name}length": float(max(of)),
        }
    if any(r.sampler_logprobs is not None for r in rollouts):
        # Their tokens have weight 0 (rlft.types.Rollout).
        broken = sum(not math.isfinite(x) for r in rollouts for x in r.sampler_logprobs or ())
        values["sampling/nonfinite_logprobs"] = float(broken)
    return values | {
        "frac_reward_zero_std": frac_zero_std(rewards, group_ids(rollouts)),
        "frac_reward_invalid": sum(map(math.isnan, rewards.tolist())) / len(lengths),
    }


def rates(rollouts: Sequence[Rollout], ran: Sequence[Batch], passes: int, clock: Clock) -> dict[str, float]:
    """Tokens per second: completion tokens over the time of generation (none for recorded ones), tokens run in all
    passes over the time of training."""
    values = {"perf/training_tokens_per_s": passes * sum(len(b.input_ids) for b in ran) / clock.seconds["train"]}
    if rollouts[0].sampler_logprobs is not None:
        sampled = sum(len(r.completion_ids) for r in rollouts)
        values["perf/rollout_tokens_per_s"] = sampled / clock.seconds["generate"]
    return values
