"""Accuracy on held-out rows, on the live engine with the adapter it holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rlft.config import Config, Sampling
from rlft.rewards.score import RewardFunction, score
from rlft.rollout.engine import Engine
from rlft.types import Prompt, Rollout


def sampling_of(cfg: Config) -> Sampling:
    """How the evaluation decodes: greedy with one sample per row unless [eval] says otherwise."""
    return Sampling(
        group_size=cfg.eval.samples, max_tokens=cfg.eval.max_tokens or cfg.sampling.max_tokens,
        temperature=cfg.eval.temperature, top_p=cfg.eval.top_p, top_k=cfg.eval.top_k,
        stop_token_ids=cfg.sampling.stop_token_ids,
    )  # fmt: skip


def evaluate(
    engine: Engine,
    prompts: Sequence[Prompt],
    cfg: Config,
    functions: Sequence[RewardFunction],
    trainer_state: dict[str, Any],
) -> tuple[dict[str, float], list[Rollout], list[float]]:
    """Mean reward over the held-out rows (avg@k with `eval.samples` = k), its standard error over rows, and lengths.

    The seed depends on the run's only, so two evaluations differ by the adapter alone. Invalid rewards are left out
    and counted. Returns metrics under "eval/", the rollouts, and their rewards (nan where invalid).
    """
    sampling = sampling_of(cfg)
    rollouts = engine.generate(prompts, sampling, seed=(cfg.seed, 2**31 + 1))
    rewards, parts = score(rollouts, functions, trainer_state)
    values = [float(r) for r in rewards]
    rows = [values[i : i + sampling.group_size] for i in range(0, len(values), sampling.group_size)]
    means = [sum(v) / len(v) for row in rows if (v := [r for r in row if not math.isnan(r)])]
    mean = sum(means) / len(means) if means else float("nan")
    spread = math.sqrt(sum((m - mean) ** 2 for m in means) / max(1, len(means) - 1)) if means else float("nan")
    lengths = [len(r.completion_ids) for r in rollouts]
    metrics = {
        "eval/reward": mean,
        "eval/reward_stderr": spread / math.sqrt(max(1, len(means))),
        "eval/rows": float(len(rows)),
        "eval/invalid": float(sum(math.isnan(v) for v in values)),
        "eval/completions/mean_length": sum(lengths) / len(lengths),
        "eval/completions/clipped_ratio": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
    }
    metrics |= {f"eval/{name}": value for name, value in parts.metrics().items() if name.startswith("rewards/")}
    return metrics, rollouts, values
