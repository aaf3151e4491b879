"""Settings that are allowed and seldom meant: sentences for the start of a run and for `rlft validate`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlft.config import secrets
from rlft.config.run import Config

HIGH_LR = 0.01
"""Learning rate above which an adapter is mostly destroyed; the usual ones are 1e-6 to 5e-4."""
READABLE = 0o055
"""Permissions of group and others to read and to enter."""


def advice(cfg: Config, rows: Sequence[Any] | None, out: Path | None = None) -> list[str]:
    """Return a sentence on each setting of a run that is probably not meant.

    rows: of the training data, None where they could not be read. out: the run folder, where it exists.
    """
    return [*_secrets(cfg), *_optimiser(cfg, rows), *_steps(cfg, rows), *_permissions(cfg, out)]


def _secrets(cfg: Config) -> Iterator[str]:
    for field, rewards in (("rewards", cfg.rewards), ("eval.rewards", cfg.eval.rewards)):
        for number, reward in enumerate(rewards):
            yield from secrets.advice(reward.args, f"{field}[{number}].args")


def _optimiser(cfg: Config, rows: Sequence[Any] | None) -> Iterator[str]:
    if cfg.optim.lr > HIGH_LR:
        yield f"optim.lr = {cfg.optim.lr:g}: above {HIGH_LR:g} most runs diverge; with LoRA 1e-5 to 2e-4 is usual"
    steps = cfg.steps
    if steps is None and rows and cfg.data.epochs:
        steps = math.ceil(len(rows) * cfg.data.epochs / cfg.prompts_per_step)
    updates = steps * cfg.optim.updates if steps else None
    if updates and cfg.optim.warmup >= updates:
        yield (
            f"optim.warmup = {cfg.optim.warmup}: the run has {updates} updates, so the learning rate never gets to "
            f"optim.lr; warmup counts updates"
        )


def _steps(cfg: Config, rows: Sequence[Any] | None) -> Iterator[str]:
    if rows and cfg.prompts_per_step > len(rows):
        yield (
            f"prompts_per_step = {cfg.prompts_per_step}: the data has {len(rows)} rows, so a step draws each of them "
            f"more than once"
        )


def _permissions(cfg: Config, out: Path | None) -> Iterator[str]:
    if cfg.share or out is None or not out.is_dir():
        return
    modes = [folder.stat().st_mode for folder in (out, *out.resolve().parents)]
    # Others must be able to enter every folder above.
    if any(all(mode & bit for mode in modes) for bit in (0o010, 0o001)) and modes[0] & READABLE:
        yield f'out = "{out}": other users can read it, and completions in it; chmod 700 it, or set share = true'
