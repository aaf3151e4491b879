"""examples/sums.toml for tests: on the unpacked model, without evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rlft.config.run import Config

ROOT = Path(__file__).parents[1]


def sums(model: Path, out: Path, **changes: Any) -> Config:
    """The demo's config with these changes."""
    cfg = Config.load(ROOT / "examples" / "sums.toml")
    data = replace(cfg.data, template=f"{ROOT}/{cfg.data.template}")
    return replace(cfg, model=str(model), out=str(out), data=data, eval=replace(cfg.eval, rows=0), **changes)
