"""The optimiser over the adapter's one flat buffer: clip, Adam, schedule, and what happens to a non-finite gradient.

AdamW is PyTorch's (fused) or bitsandbytes' (8-bit moments); one buffer makes each of them one kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlft.config import Optim
from rlft.errors import ConfigError, TrainError


@dataclass(frozen=True)
class Update:
    """What one optimiser update did."""

    grad_norm: float
    """Global norm before clipping."""
    learning_rate: float
    skipped: bool
    """True when the gradient was not finite: weights and moments are as before."""


def learning_rate(cfg: Optim, update: int, total: int) -> float:
    """Learning rate of update 0, 1, ...: linear warm-up over `cfg.warmup` updates, then the schedule to `total`."""
    if update < cfg.warmup:
        return cfg.lr * (update + 1) / cfg.warmup
    if cfg.schedule == "constant":
        return cfg.lr
    done = min(1.0, (update - cfg.warmup) / max(1, total - cfg.warmup))
    return cfg.lr * (1 - done if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


class Optimizer:
    """AdamW over `flat`, whose `.grad` holds the summed gradient of the update."""

    def __init__(self, flat: nn.Parameter, cfg: Optim, total: int) -> None:
        """total: updates of the whole run, for the schedule. Raises ConfigError for adamw_8bit without a GPU."""
        self._flat, self._cfg, self._total = flat, cfg, total
        options = {"lr": cfg.lr, "betas": cfg.betas, "eps": cfg.eps, "weight_decay": cfg.weight_decay}
        if cfg.name == "adamw_8bit":
            if flat.device.type != "cuda":
                raise ConfigError(f'optim.name = "adamw_8bit" needs a GPU, this run is on {flat.device}: set "adamw"')
            from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportPrivateImportUsage]

            self._adam: torch.optim.Optimizer = AdamW8bit([flat], **options)
        else:
            self._adam = torch.optim.AdamW([flat], fused=True, **options)

    def step(self, update: int, skipped_before: int) -> Update:
        """Clip and apply the gradient in `flat.grad`. skipped_before: updates skipped in a row so far.

        A non-finite gradient changes nothing. Raises TrainError when that makes `max_skipped` in a row.
        """
        grad = self._flat.grad
        assert grad is not None
        norm = float(torch.linalg.vector_norm(grad))
        rate = learning_rate(self._cfg, update, self._total)
        if not math.isfinite(norm):
            if skipped_before + 1 >= self._cfg.max_skipped:
                raise TrainError(
                    f"{skipped_before + 1} updates in a row had a non-finite gradient (norm {norm}): lower optim.lr "
                    f'({self._cfg.lr}), check the rewards for extreme values, or set dtype = "float32"'
                )
            return Update(norm, rate, skipped=True)
        if self._cfg.max_grad_norm and norm > self._cfg.max_grad_norm:
            grad.mul_(self._cfg.max_grad_norm / norm)
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        return Update(norm, rate, skipped=False)

    def tensors(self) -> dict[str, Tensor]:
        """The moments, by name; empty before the first update."""
        state = self._adam.state_dict()["state"].get(0, {})
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        state = self._adam.state_dict()
        state["state"] = {0: dict(tensors)} if tensors else {}
        self._adam.load_state_dict(state)
