"""Compute the metrics of one step under TRL's names: lengths, reward spread, times, tokens per second."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rlft.algos.advantages import frac_zero_std
from rlft.batch import group_numbers, samples_of
from rlft.trainer.optim import Update
from rlft.types import Batch, Group, Rollout, Stat, Stats


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
        """Return time/PHASE, step_time (from the start of the step to now) and time/idle (outside all phases)."""
        total = time.perf_counter() - self.start
        idle = max(0.0, total - sum(self.seconds.values()))
        return {f"time/{phase}": seconds for phase, seconds in self.seconds.items()} | {
            "time/idle": idle,
            "step_time": total,
        }


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return perf/peak_GiB, or nothing where the system does not report it.

    On a GPU this is PyTorch's peak since the last call, on a CPU the peak of the process since its start.
    """
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
    """Return loss and entropy of a micro-batch, and the number of tokens where log-prob or entropy is not finite.

    logprobs, entropy: [T], 0 where nothing is trained. The loss is a sum: its weights include the normalisation.
    """
    broken = (~(logprobs.detach() + entropy.detach()).isfinite()).sum()
    return {
        "loss": Stat("sum", loss.detach()),
        "entropy": Stat.mean(entropy, batch.train_mask),
        "nonfinite_logprobs": Stat("sum", broken),
    }


def perplexity(nll: float) -> float:
    """Return the perplexity of a mean negative log-prob in nats, inf where it would overflow."""
    return math.exp(nll) if nll < 700 else math.inf


def update_values(updates: Sequence[Update], values: dict[str, float]) -> dict[str, float]:
    """Return means of loss and gradient norm over the updates of a step, and the last learning rate.

    values: the step's metrics, whose loss is the sum over its updates.
    """
    averages = {
        "grad_norm": sum(update.grad_norm for update in updates) / len(updates),
        "learning_rate": updates[-1].learning_rate,
    }
    return averages | ({"loss": values["loss"] / len(updates)} if "loss" in values else {})


def rollout_values(groups: Sequence[Group]) -> dict[str, float]:
    """Return completions/*, and the shares of groups with equal rewards and of invalid rewards.

    Lengths are in tokens; "terminated" completions are those not truncated. sampling/image_tokens counts sampled places
    of images, which are not trained.
    """
    samples = samples_of(groups)
    rollouts = [sample.rollout for sample in samples]
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float32)
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    terminated = [len(rollout.completion_ids) for rollout in rollouts if not rollout.truncated]
    values = {"completions/clipped_ratio": 1 - len(terminated) / len(lengths)}
    for name, some_lengths in (("", lengths), ("terminated_", terminated or [0])):
        values |= {
            f"completions/mean_{name}length": sum(some_lengths) / len(some_lengths),
            f"completions/min_{name}length": float(min(some_lengths)),
            f"completions/max_{name}length": float(max(some_lengths)),
        }
    if any(rollout.sampler_logprobs is not None for rollout in rollouts):
        # Such tokens have weight 0 (rlft.types.Rollout).
        broken = sum(not math.isfinite(logprob) for rollout in rollouts for logprob in rollout.sampler_logprobs or ())
        values["sampling/nonfinite_logprobs"] = float(broken)
        if any(rollout.prompt.images for rollout in rollouts):
            values["sampling/image_tokens"] = float(sum(rollout.completion_mask.count(False) for rollout in rollouts))
    return values | {
        "frac_reward_zero_std": frac_zero_std(rewards, group_numbers(groups)),
        "frac_reward_invalid": sum(map(math.isnan, rewards.tolist())) / len(lengths),
    }


def rates(rollouts: Sequence[Rollout], ran: Sequence[Batch], passes: int, clock: Clock) -> dict[str, float]:
    """Return tokens per second of generation (sampled completions only) and of training (tokens of all passes)."""
    values = {
        "perf/training_tokens_per_s": passes * sum(len(batch.input_ids) for batch in ran) / clock.seconds["train"]
    }
    if rollouts[0].sampler_logprobs is not None:
        tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
        values["perf/rollout_tokens_per_s"] = tokens / clock.seconds["generate"]
    return values


def packing_stats(batches: Sequence[Batch], ran: Sequence[Batch]) -> dict[str, float]:
    """Return the batch/* metrics of an update. batches: all results of `pack`. ran: those that were run.

    batch/tokens: tokens run. batch/micro_batches: how many were run. batch/packing_ratio: tokens of the same rows
    padded to the longest, over tokens run. batch/shared_prefix_saving: prompt tokens saved by sharing, over
    tokens without sharing. batch/skipped: rows that were packed and not run.
    """
    tokens = sum(len(batch.input_ids) for batch in ran)
    full = []  # prompt and completion of every row that was run
    for batch in ran:
        lengths = [end - start for start, end in itertools.pairwise(batch.cu_seqlens.tolist())]
        rows = zip(lengths, batch.prefix.tolist(), batch.group_ids.tolist(), strict=True)
        full += [length + (lengths[prefix] if prefix >= 0 else 0) for length, prefix, group in rows if group >= 0]
    total = sum(len(batch.samples) for batch in batches)
    return {
        "batch/tokens": float(tokens),
        "batch/micro_batches": float(len(ran)),
        "batch/packing_ratio": len(full) * max(full, default=0) / max(1, tokens),
        "batch/shared_prefix_saving": 1 - tokens / max(1, sum(full)) if full else 0.0,
        "batch/skipped": float(total - len(full)),
    }
