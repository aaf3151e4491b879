"""The base of the policy losses: common settings, sampler correction, KL and entropy terms, and the weighted sum.

    loss = sum_t weight_t ( loss_t c_t + kl_coef KL_t - entropy_coef H_t )

loss_t is `token_loss` of the loss itself. c_t is the weight of `rlft.algos.corrections`, 0 for masked tokens; these
still count in the denominator, which is part of weight_t.

Legend: d logprob - ref_logprob of a token.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlft.algos.checks import check_choice, check_zero_or_more
from rlft.algos.corrections import Correction, SamplerCorrection, Weight
from rlft.algos.kl import Penalty, difference, k3, penalty
from rlft.algos.loss import Loss
from rlft.algos.tokens import Tokens, read
from rlft.errors import ConfigError
from rlft.types import Aggregation, Batch, Stat, Stats, StepInputs, StepView


@dataclass(frozen=True)
class PolicyLoss(Loss):
    """A loss over sampled completions, with the settings of [algo] common to all of them."""

    has_ratio: ClassVar[bool] = True
    against_sampler: ClassVar[bool] = False
    """The formula has a ratio against the sampler, so it needs the sampler's log-probs and takes no correction."""

    advantage: str = "group_norm"
    """Estimator: a name in rlft.algos.advantages ("group_norm", "group_mean", "leave_one_out", ...), or
    "file.py:function"."""
    aggregation: Aggregation = "token_mean"
    """How token losses are reduced to one number: token_mean, sequence_mean, constant, sequence_sum, prompt_mean."""
    correction: Correction = "auto"
    """Correction for the sampler: see rlft.algos.corrections. "auto" is "single" with one update per rollout batch and
    "decoupled" with several."""
    correction_weight: Weight = "token_truncate"
    """Whether the weight is the ratio of the token or of its sequence. Outside [correction_floor, correction_cap] it is
    set to the bound (truncate) or to 0 (mask)."""
    correction_cap: float = 2.0
    """Largest correction weight."""
    correction_floor: float = 0.0
    """Smallest correction weight."""
    sequence_mask_low: float = 0.0
    """Sequences whose geometric mean of trainer / sampler is below this are masked; 0: none."""
    sequence_mask_high: float = math.inf
    """Sequences whose geometric mean of trainer / sampler is above this are masked; inf: none."""
    off_policy_limit: float = math.inf
    """Sequences of negative advantage are masked where the mean of sampler - now is above this, in nats; inf: none
    (off-policy sequence masking of DeepSeek-V3.2)."""
    kl_coef: float = 0.0
    """Factor of the KL term; 0 skips the reference forward."""
    kl: Penalty = "k3_ratio"
    """Estimator of the KL term, or "reward" to subtract k1 from the reward: see rlft.algos.kl."""
    entropy_coef: float = 0.0
    """Factor of the entropy bonus; the initial value if `entropy_target` is set."""
    entropy_target: float | None = None
    """Adaptive entropy (2505.22312): the bonus is active only after a step whose mean entropy, in nats, was at most
    this. Its factor grows after such steps and falls after the others. None: the factor is constant."""
    entropy_coef_delta: float = 0.005
    """Change of the factor per step."""
    entropy_coef_max: float = 1.0
    """Largest factor; the smallest is 0."""
    entropy_share: float = 1.0
    """Share of an update's tokens, those of highest entropy, in the policy term (2506.01939)."""

    def __post_init__(self) -> None:
        check_zero_or_more(
            kl_coef=self.kl_coef,
            entropy_coef=self.entropy_coef,
            entropy_coef_delta=self.entropy_coef_delta,
            entropy_coef_max=self.entropy_coef_max,
            correction_floor=self.correction_floor,
            sequence_mask_low=self.sequence_mask_low,
        )
        if not 0 < self.entropy_share <= 1:
            raise ConfigError(f"algo.entropy_share = {self.entropy_share}: want above 0, at most 1 (every token)")
        check_choice(Aggregation, aggregation=self.aggregation)
        check_choice(Penalty, kl=self.kl)
        check_choice(Correction, correction=self.correction)
        check_choice(Weight, correction_weight=self.correction_weight)
        self._check_ranges()
        self._check_corrected_once()

    @abstractmethod
    def token_loss(self, tokens: Tokens) -> tuple[Tensor, Stats]:
        """Return the loss of each token, [T] with gradient, before correction and other terms, and its metrics."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss has a KL term."""
        return self.kl_coef > 0 and self.kl != "reward"

    @property
    def needs_sampler(self) -> bool:
        """Whether the ratio (correction "bypass") or a sequence mask uses the sampler's log-probs."""
        return self.against_sampler or self.correction == "bypass" or self.sampler_correction.masks_sequences

    @property
    def zero_adv_zero_grad(self) -> bool:
        """Whether tokens of zero advantage have no gradient: without a KL term and an entropy bonus."""
        return not self.needs_reference and not self.entropy_grad

    @property
    def entropy_grad(self) -> bool:
        """Whether an entropy bonus needs the gradient of the entropy."""
        return self.entropy_coef > 0 or self.entropy_target is not None

    @property
    def kl_in_reward(self) -> float:
        """Factor of the KL that is subtracted from each reward."""
        return self.kl_coef if self.kl == "reward" else 0.0

    @property
    def sampler_correction(self) -> SamplerCorrection:
        """The settings that correct for the sampler."""
        return SamplerCorrection(
            self.correction,
            self.correction_weight,
            self.correction_cap,
            self.correction_floor,
            self.sequence_mask_low,
            self.sequence_mask_high,
            self.off_policy_limit,
        )

    def common_summary(self) -> str:
        """Describe KL, entropy and correction, the end of every `summary`."""
        terms = [f"{self.kl_coef:g} x KL ({self.kl})" if self.kl_coef else "no KL"]
        if self.entropy_grad:
            target = f" below {self.entropy_target:g} nat" if self.entropy_target is not None else ""
            terms.append(f"entropy bonus {self.entropy_coef:g}{target}")
        if self.entropy_share < 1:
            terms.append(f"the {self.entropy_share:.0%} of tokens with the highest entropy")
        return ", ".join([*terms, self.sampler_correction.summary()])

    def prepare(self, view: StepView) -> StepInputs:
        """Return the factor of the entropy bonus, and the entropy floor if `entropy_share` is below 1.

        The floor is the quantile over the update's tokens under its initial policy, so every update trains on that
        share.
        """
        floor = view.entropy_quantile(1 - self.entropy_share) if self.entropy_share < 1 else None
        return StepInputs(entropy_floor=floor, entropy_coef=view.adapted.get("entropy_coef_now"))

    def adapt(self, adapted: dict[str, float], entropy: float) -> dict[str, float]:
        """Return the new factor of the entropy bonus, given the mean entropy of the last step in nats.

        The result has `entropy_coef`, and `entropy_coef_now`, which is 0 when the entropy was above the target.
        """
        if self.entropy_target is None or math.isnan(entropy):
            return adapted
        low, coef = entropy <= self.entropy_target, adapted.get("entropy_coef", self.entropy_coef)
        change = self.entropy_coef_delta if low else -self.entropy_coef_delta
        coef = min(self.entropy_coef_max, max(0.0, coef + change))
        return {"entropy_coef": coef, "entropy_coef_now": coef if low else 0.0}

    def __call__(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        """Return the weighted sum of `token_loss` with correction, KL and entropy terms (0-dim), and the metrics.

        logprobs: [T] with gradient.
        """
        tokens = read(logprobs, batch)
        token_loss, own_stats = self.token_loss(tokens)
        stats: Stats = {}
        if batch.sampler_logprobs is not None:
            weight, stats = self.sampler_correction.weigh(tokens)
            token_loss = token_loss * weight
        if self.entropy_share < 1:
            assert batch.entropy is not None and batch.inputs.entropy_floor is not None
            token_loss = torch.where(batch.entropy.detach() >= batch.inputs.entropy_floor, token_loss, 0)
        if self.needs_reference:
            assert batch.ref_logprobs is not None
            ref = torch.where(tokens.used, batch.ref_logprobs, 0)
            token_loss = token_loss + self.kl_coef * penalty(self.kl, tokens.now, ref, tokens.log_ratio().exp())
            d = difference(tokens.now.detach(), ref)
            stats |= {"kl": Stat.mean(k3(d), tokens.used), "kl/k1": Stat.mean(d, tokens.used)}
        if self.entropy_grad:
            assert batch.entropy is not None
            stats["policy_loss"] = Stat("sum", (token_loss.detach() * batch.weight).sum())
            coef = batch.inputs.entropy_coef
            if coef is None:  # there is no entropy before the first step
                coef = self.entropy_coef if self.entropy_target is None else 0.0
            token_loss = token_loss - coef * torch.where(tokens.used, batch.entropy, 0)
        return (token_loss * batch.weight).sum(), stats | own_stats

    def _check_ranges(self) -> None:
        """Raise ConfigError for a range of correction weights or sequence masks without 1."""
        if not self.correction_cap >= 1:
            raise ConfigError(f"algo.correction_cap = {self.correction_cap}: want 1 or more")
        if self.correction_floor > 1:
            raise ConfigError(f"algo.correction_floor = {self.correction_floor}: want 1 or less")
        if self.sequence_mask_low > 1 or not self.sequence_mask_high >= 1:
            raise ConfigError(
                f"algo.sequence_mask_low = {self.sequence_mask_low}, algo.sequence_mask_high = "
                f"{self.sequence_mask_high}: want a band around 1"
            )
        if math.isnan(self.off_policy_limit):
            raise ConfigError(f"algo.off_policy_limit = {self.off_policy_limit}: want a number of nats")

    def _check_corrected_once(self) -> None:
        """Raise ConfigError for settings that would correct twice or have no effect."""
        default = type(self)
        weights = {
            "correction_weight": (self.correction_weight, default.correction_weight),
            "correction_cap": (self.correction_cap, default.correction_cap),
            "correction_floor": (self.correction_floor, default.correction_floor),
        }
        name, value = next(((name, value) for name, (value, usual) in weights.items() if value != usual), ("", None))
        if name and self.correction == "bypass":
            raise ConfigError(
                f'algo.{name} = {value} with algo.correction = "bypass": the ratio is against the sampler, so a weight '
                f'would correct twice; leave it out, or set algo.correction = "decoupled"'
            )
        if name and self.correction == "none":
            raise ConfigError(f'algo.{name} = {value} with algo.correction = "none": there is no weight; leave one out')
        if self.correction == "bypass" and self.sampler_correction.has_sequence_mask:
            raise ConfigError(
                f"algo.sequence_mask_low = {self.sequence_mask_low}, algo.sequence_mask_high = "
                f'{self.sequence_mask_high} with algo.correction = "bypass": old is the sampler, so no sequence is '
                f'ever outside; set algo.correction = "decoupled"'
            )
        if self.against_sampler and self.correction != "none":
            raise ConfigError(
                f'algo.correction = "{self.correction}": the ratio of {type(self).__name__.lower()} is against the '
                f"sampler by itself, so a correction would count twice; leave it out"
            )
