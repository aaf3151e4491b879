"""The optimiser over the adapter's flat buffer: clipping, AdamW, schedule, and skipping of non-finite gradients.

AdamW is PyTorch's fused one or bitsandbytes' with 8-bit moments. With one flat buffer, each is a single kernel. Reading
the gradient norm is the only GPU synchronisation of an update (bitsandbytes adds one after its kernel).

In float16 small gradients would round to 0, so the loss is multiplied by a power of two and the gradient divided by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlft.config.run import Optim
from rlft.errors import ConfigError, TrainError
from rlft.trainer.given_optimizer import GivenOptimizer, set_state, state_of


@dataclass(frozen=True)
class Update:
    """Result of one optimiser update."""

    grad_norm: float
    """Global norm before clipping."""
    learning_rate: float
    skipped: bool
    """True when the gradient was not finite: weights and moments are unchanged."""


def learning_rate(cfg: Optim, update: int, total: int) -> float:
    """Return the learning rate of update 0, 1, ...: linear warm-up over `cfg.warmup`, then the schedule to `total`.

    Follows transformers' `get_{constant,linear,cosine}_schedule_with_warmup`, with two differences. During warm-up,
    update u has the rate that transformers gives to u + 1: its first update has rate 0, which would waste a batch of
    rollouts. From update `total` on the rate stays at its final value, whereas the cosine of transformers rises again.
    """
    if update < cfg.warmup:
        return cfg.lr * (update + 1) / cfg.warmup
    if cfg.schedule == "constant":
        return cfg.lr
    progress = min(1.0, (update - cfg.warmup) / max(1, total - cfg.warmup))
    return cfg.lr * (1 - progress if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


class LossScale:
    """The factor of a float16 run: halved after a non-finite gradient, doubled after 2,000 finite ones in a row.

    This is the rule of torch.amp.GradScaler, which keeps its state on the GPU and checks every gradient by itself. The
    minimum is 1: a smaller factor does not help a gradient that overflows unscaled.
    """

    def __init__(self) -> None:
        self.value = 2.0**16
        self.good = 0
        """Finite gradients in a row since the last change."""

    def update(self, finite: bool) -> None:
        """Set the factor of the next update."""
        self.good += 1
        if not finite:
            self.value, self.good = max(1.0, self.value / 2), 0
        elif self.good == 2000:
            self.value, self.good = self.value * 2, 0


class Optimizer:
    """AdamW over `flat`, whose `.grad` holds the summed gradient of the update."""

    def __init__(
        self,
        flat: nn.Parameter,
        cfg: Optim,
        total: int,
        fp16: bool = False,
        views: Iterable[Tensor] = (),
        given: GivenOptimizer | None = None,
    ) -> None:
        """Create the optimiser over `flat`.

        total: updates of the whole run, for the schedule. fp16: the model computes in float16, so scale the loss.
        views: tensors that share the memory of `flat` but have separate version counters. Each step increments these,
        so that a backward whose forward ran before the step is an error. given: makes another optimiser than AdamW.
        """
        self._flat, self._cfg, self._total, self._views = flat, cfg, total, tuple(views)
        self._scale, self._given = LossScale() if fp16 else None, given
        self._inner: torch.optim.Optimizer
        options = {"lr": cfg.lr, "betas": cfg.betas, "eps": cfg.eps, "weight_decay": cfg.weight_decay}
        if given is not None:
            self._inner = given.over(flat, cfg)
        elif cfg.name == "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportPrivateImportUsage]

            self._inner = AdamW8bit([flat], **options)
        else:
            self._inner = torch.optim.AdamW([flat], fused=True, **options)

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss to call `backward` on: multiplied by the loss scale in float16, unchanged otherwise.

        The factor changes in `step` only, so it is the same for all micro-batches of an update, on all ranks.
        """
        return loss if self._scale is None else loss * self._scale.value

    def step(self, update: int, skipped_before: int) -> Update:
        """Clip and apply the gradient of the `scaled` losses in `flat.grad`.

        skipped_before: consecutive updates skipped before this one. The gradient is clipped to the global norm
        `max_grad_norm`, as torch.nn.utils.clip_grad_norm_ does, except for the 1e-6 it adds. A gradient of 0
        (all completions invalid or masked) still counts as an update: weight decay and Adam's momentum move the
        weights, as in TRL. A non-finite gradient changes only the loss scale. Raises TrainError when `max_skipped`
        consecutive updates, or all of a shorter run, were skipped; in float16 only once the loss scale is down to 1,
        since a larger scale may itself be the cause.
        """
        grad = self._flat.grad
        assert grad is not None
        scale = 1.0 if self._scale is None else self._scale.value
        if scale != 1:
            grad.div_(scale)
        norm = float(torch.linalg.vector_norm(grad, dtype=torch.float64))
        rate = learning_rate(self._cfg, update, self._total)
        finite = math.isfinite(norm)
        if self._scale is not None:
            self._scale.update(finite)
        if not finite:
            if scale == 1 and skipped_before + 1 >= min(self._cfg.max_skipped, self._total):
                raise TrainError(
                    f"{skipped_before + 1} updates in a row had a non-finite gradient (norm {norm}): lower optim.lr "
                    f'({self._cfg.lr}), check the rewards for extreme values, or set dtype = "float32"'
                )
            return Update(norm, rate, skipped=True)
        if self._cfg.max_grad_norm and norm > self._cfg.max_grad_norm:
            grad.mul_(self._cfg.max_grad_norm / norm)
        self._inner.param_groups[0]["lr"] = rate
        self._inner.step()
        torch.autograd.graph.increment_version(self._views)
        return Update(norm, rate, skipped=False)

    def metrics(self) -> dict[str, float]:
        """Return the loss_scale of the next update in a float16 run; empty otherwise."""
        return {} if self._scale is None else {"loss_scale": self._scale.value}

    def tensors(self) -> dict[str, Tensor]:
        """Return the state to save, by name: moments and Adam's step (after the first update), and the loss scale."""
        tensors = state_of(self._inner, self._flat) if self._given else self._adam_tensors()
        if self._scale is not None:
            tensors |= {"loss_scale": torch.tensor(self._scale.value, dtype=torch.float64)}
            tensors |= {"loss_scale_good": torch.tensor(self._scale.good)}
        return tensors

    def _adam_tensors(self) -> dict[str, Tensor]:
        # Not from `state_dict`, where bitsandbytes nests its tensors in another dictionary. Its step is an int.
        return {name: torch.as_tensor(value) for name, value in self._inner.state.get(self._flat, {}).items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore the result of `tensors`; the loss scale only where this run has one.

        Raises ConfigError when the tensors belong to the other optimiser.
        """
        moments = dict(tensors)
        scale, good = moments.pop("loss_scale", None), moments.pop("loss_scale_good", None)
        if self._scale is not None and scale is not None and good is not None:
            self._scale.value, self._scale.good = float(scale), int(good)
        if not moments:
            self._inner.state.clear()
            return
        if self._given is not None:
            set_state(self._inner, self._flat, moments)
            return
        saved_name = "adamw_8bit" if "state1" in moments else "adamw"
        if saved_name != self._cfg.name:
            raise ConfigError(
                f'optim.name = "{self._cfg.name}": the checkpoint has the moments of "{saved_name}"; resume with '
                f'optim.name = "{saved_name}", or start in another folder with --out'
            )
        eight_bit = saved_name == "adamw_8bit"
        values = {name: int(value) if eight_bit and name == "step" else value for name, value in moments.items()}
        self._inner.load_state_dict(self._inner.state_dict() | {"state": {0: values}})
