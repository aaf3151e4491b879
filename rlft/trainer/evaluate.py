"""Evaluate on held-out rows: rewards of sampled completions, and the loss of recorded ones.

Metric names, as logged, printed and reported (NAME is eval/reward or one of eval/pass@K):

    eval/reward                    mean over rows of the mean reward of a row's completions: avg@k, k = eval.samples
    eval/pass@K                    mean over rows of the chance that one of K completions is solved (unbiased)
    NAME_stderr, _low, _high       standard error over rows; 95% interval (Wilson for 0/1 rows, else bootstrap)
    NAME_change                    difference from the run's first evaluation, over the rows in both
    NAME_change_stderr, _low, _high  the same for that difference, paired by row (bootstrap)
    eval/rows, eval/samples        held-out rows; completions sampled per row (absent when only the loss is measured)
    eval/chosen_among              `rlft eval --checkpoint best`: number of evaluations it is the best of
    eval/invalid                   completions without a valid reward, excluded from all the above
    eval/rewards/FUNCTION/mean, /std, /invalid     per reward function
    eval/completions/mean_length, /clipped_ratio   tokens; share truncated at eval.max_tokens (scored as is)
    eval/loss                      recorded rows: the training loss, without dropout
    eval/perplexity                exp of the mean negative log-prob of recorded tokens (of the chosen side of a pair)
    eval/...                       metrics of the loss: eval/rewards/accuracies, eval/rewards/margins, ... for dpo

A completion is solved when its reward is at least `eval.threshold`. A row with fewer than K valid rewards is excluded
from pass@K. Standard errors and bootstrap intervals need two rows and are absent with one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlft import dist
from rlft.algos.algorithm import Algorithm
from rlft.batch import count, groups_of, pack, samples_of
from rlft.config.data import Eval, Sampling
from rlft.config.run import Config
from rlft.errors import TrainError
from rlft.models.policy import Policy
from rlft.rewards.function import RewardFunction
from rlft.rewards.overlap import Scoring
from rlft.rewards.parts import RewardBreakdown
from rlft.rewards.score import finish, score_samples
from rlft.rollout.engine import Engine
from rlft.rollout.replay import ReplayEngine
from rlft.trainer.broken import not_finite
from rlft.trainer.estimates import Estimate, estimate_difference, estimate_mean, pass_at_k
from rlft.trainer.metrics import Metrics
from rlft.trainer.prepare import assign_advantages, dealt
from rlft.trainer.sample import gathered
from rlft.trainer.step import MiniBatch, batch_loss, step_inputs
from rlft.trainer.step_metrics import perplexity
from rlft.types import PackPlan, Prompt, Rollout, Sample, Stat

ROUNDING = 1e-6
"""Relative tolerance of the threshold: a float32 sum of weights may just miss it."""


@dataclass(frozen=True)
class Evaluation:
    """Result of sampling on held-out rows."""

    metrics: dict[str, float]
    samples: list[Sample]
    faults: list[str]
    """One line per reward function that failed on some completions."""

    def by_row(self) -> dict[int, list[float]]:
        """Return row number in the dataset -> rewards of its completions."""
        rows: dict[int, list[float]] = {}
        for sample in self.samples:
            rows.setdefault(sample.rollout.prompt.index, []).append(sample.reward)
        return rows

    def graded(self) -> bool:
        """Return True when some reward is neither 0 nor 1, so that "solved" depends on the threshold."""
        rewards = [sample.reward for sample in self.samples]
        return any(reward not in (0.0, 1.0) for reward in rewards if not math.isnan(reward))


def sampling_of(cfg: Config) -> Sampling:
    """Return how the evaluation decodes: greedy with one sample per row unless [eval] sets otherwise."""
    stops = cfg.sampling.stop_token_ids if cfg.eval.stop_token_ids is None else cfg.eval.stop_token_ids
    return Sampling(
        group_size=cfg.eval.samples,
        max_tokens=cfg.eval.max_tokens or cfg.sampling.max_tokens,
        temperature=cfg.eval.temperature,
        top_p=cfg.eval.top_p,
        top_k=cfg.eval.top_k,
        stop_token_ids=stops,
        stop=cfg.sampling.stop,
    )


def evaluate(
    engine: Engine,
    prompts: Sequence[Prompt],
    cfg: Config,
    functions: Sequence[RewardFunction],
    trainer_state: dict[str, Any],
) -> Evaluation:
    """Sample `eval.samples` completions of every prompt and score them.

    The seed depends only on the run's seed, so two evaluations differ by the adapter alone. Raises TrainError when most
    of the engine's log-probs are not finite, since the completions are then meaningless.
    """
    prompts = list(prompts)  # a table creates its prompts at each access
    share, seed = dist.share(len(prompts)), (cfg.seed, 2**31 + 1)

    def evaluate_share() -> tuple[list[Rollout], RewardBreakdown]:
        own = prompts[share]
        with Scoring(functions, prompts, trainer_state) as scoring:
            finished = scoring.add if scoring.overlaps else None
            rollouts = engine.generate(own, sampling_of(cfg), seed, finished, share.start) if len(own) else []
            _check_finite(rollouts, cfg)
            scores = finish(scoring, rollouts, functions)
            return [replace(rollout, routes=None) for rollout in rollouts], scores  # nothing trains on them

    rollouts, parts = gathered(evaluate_share, prompts)
    samples = samples_of(groups_of(rollouts))
    parts.store(samples)
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    metrics = {
        "eval/rows": float(len(prompts)),
        "eval/samples": float(cfg.eval.samples),
        "eval/invalid": float(sum(math.isnan(sample.reward) for sample in samples)),
        "eval/completions/mean_length": sum(lengths) / len(lengths),
        "eval/completions/clipped_ratio": sum(rollout.truncated for rollout in rollouts) / len(rollouts),
    }
    metrics |= {f"eval/{name}": value for name, value in parts.metrics().items() if name.startswith("rewards/")}
    evaluation = Evaluation(metrics, samples, parts.faults())
    return replace(evaluation, metrics=averages(list(evaluation.by_row().values()), cfg.eval) | metrics)


def _check_finite(rollouts: Sequence[Rollout], cfg: Config) -> None:
    logprobs = [logprob for rollout in rollouts for logprob in rollout.sampler_logprobs or ()]
    broken = sum(not math.isfinite(logprob) for logprob in logprobs)
    if 2 * broken > len(logprobs):
        raise TrainError(
            f"{broken} of {len(logprobs)} log-probs of the engine are not finite on held-out rows, so its completions "
            f'mean nothing: check the weights of model = "{cfg.model}" and of the adapter, and dtype = "{cfg.dtype}"'
        )


def averages(rows: Sequence[Sequence[float]], cfg: Eval) -> dict[str, float]:
    """Return eval/reward and eval/pass@K with their errors, from the rewards of each row (nan: invalid)."""
    values = [_results(row, cfg) for row in rows]
    metrics: dict[str, float] = {"eval/reward": math.nan}  # there even when every reward is invalid
    for name in _names(cfg):
        of_rows = [row[name] for row in values if name in row]
        if of_rows:
            metrics |= _named(name, estimate_mean(of_rows))
    return metrics


def change(before: Mapping[int, Sequence[float]], now: Mapping[int, Sequence[float]], cfg: Eval) -> dict[str, float]:
    """Return NAME_change of every result that two evaluations share: now - before, paired by row.

    Paired because rows differ from each other far more than one row changes between evaluations, so the error of the
    change is that of the per-row differences.
    """
    pairs = [(_results(before[row], cfg), _results(now[row], cfg)) for row in now if row in before]
    metrics: dict[str, float] = {}
    for name in _names(cfg):
        differences = [new[name] - old[name] for old, new in pairs if name in old and name in new]
        if differences:
            metrics |= _named(f"{name}_change", estimate_difference(differences))
    return metrics


def _names(cfg: Eval) -> list[str]:
    return ["eval/reward", *(f"eval/pass@{k}" for k in cfg.ks())]


def _results(rewards: Sequence[float], cfg: Eval) -> dict[str, float]:
    """Return the mean reward and pass@K of one row, as far as its valid rewards suffice."""
    valid = [reward for reward in rewards if not math.isnan(reward)]
    if not valid:
        return {}
    threshold = cfg.threshold - ROUNDING * max(1.0, abs(cfg.threshold))
    successes = sum(reward >= threshold for reward in valid)
    passes = {f"eval/pass@{k}": pass_at_k(len(valid), successes, k) for k in cfg.ks() if k <= len(valid)}
    return {"eval/reward": sum(valid) / len(valid), **passes}


def _named(name: str, estimate: Estimate) -> dict[str, float]:
    values = {
        name: estimate.mean,
        f"{name}_stderr": estimate.stderr,
        f"{name}_low": estimate.low,
        f"{name}_high": estimate.high,
    }
    return {key: value for key, value in values.items() if not math.isnan(value)}


def measures_loss(prompts: Sequence[Prompt], held: Sequence[Prompt]) -> bool:
    """Return True when held-out rows record as many completions as training rows, so the same loss applies."""
    return bool(prompts[0].recorded) and all(len(prompt.recorded) == len(prompts[0].recorded) for prompt in held)


def recorded_loss(policy: Policy, prompts: Sequence[Prompt], algorithm: Algorithm, plan: PackPlan) -> dict[str, float]:
    """Compute the algorithm's loss and its metrics over the recorded completions of held-out rows.

    The loss is that of a single update over all rows, without gradient and dropout. Raises TrainError when one of the
    policy's log-probs is not finite.
    """
    engine = ReplayEngine()
    engine.load_adapter(policy.adapter(), version=0)
    groups = groups_of(engine.generate(prompts, Sampling(), seed=(0,)))
    score_samples(samples_of(groups), (), {})
    assign_advantages(policy, algorithm, plan, groups, {})
    batches = pack(groups, plan, count(groups))
    inputs = step_inputs(policy, algorithm, plan, MiniBatch(groups, batches, batches, batches), {})
    metrics = Metrics()
    with torch.no_grad():
        for batch in dealt(batches):
            if algorithm.loss.needs_reference:
                batch = replace(batch, ref_logprobs=policy.score(batch, weights="reference"))
            logprobs, entropy = policy.score(batch), None
            if inputs.entropy_floor is not None or algorithm.loss.entropy_grad:
                entropy = policy.entropy(batch)
            if algorithm.old == "trainer":
                batch = replace(batch, old_logprobs=logprobs)
            loss, stats, here = batch_loss(policy, algorithm, batch, logprobs, entropy, inputs)
            positive = here.train_mask & (here.advantages > 0)
            nll, nonfinite = Stat.mean(-logprobs, positive), Stat("sum", (~logprobs.isfinite()).sum())
            metrics.add({"loss": Stat("sum", loss), **stats, "nll": nll, "bad": nonfinite})
    values = metrics.reduce().values()
    if nonfinite := values.pop("bad", 0.0):
        raise not_finite(policy, batches, f"{nonfinite:.0f} of the policy's log-probs of held-out completions")
    values["perplexity"] = perplexity(values.pop("nll", math.nan))
    return {"eval/rows": float(len(prompts)), **{f"eval/{name}": value for name, value in values.items()}}
