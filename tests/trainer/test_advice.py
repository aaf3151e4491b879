"""Settings that are allowed and seldom meant are told, and those that are meant are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlft.config.data import Reward
from rlft.config.run import Config
from rlft.trainer.advice import advice

ROWS = [{"prompt": str(i)} for i in range(20)]


def told(out: Path | None = None, **settings: Any) -> list[str]:
    return advice(Config(**{"model": "m", "data": "d", "out": "o", "steps": 5, **settings}), ROWS, out)  # type: ignore[arg-type]


def test_nothing_is_said_of_usual_settings() -> None:
    assert (
        told(optim={"warmup": 2, "lr": 2e-4}, rewards=[Reward("number", args={"key": "env:KEY", "max_tokens": 3})])
        == []
    )


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"optim": {"lr": 3}}, "optim.lr = 3: above 0.01 most runs diverge"),
        ({"optim": {"warmup": 5}}, "optim.warmup = 5: the run has 5 updates"),
        ({"steps": None, "data": {"path": "d", "epochs": 1}, "optim": {"warmup": 2}}, "the run has 2 updates"),
        ({"prompts_per_step": 21}, "prompts_per_step = 21: the data has 20 rows"),
        ({"rewards": [Reward("number", args={"key": "abc"})]}, "rewards[0].args.key: looks like a secret"),
        (
            {"eval": {"rows": 1, "rewards": [Reward("number", args={"key": "a"})]}},
            "eval.rewards[0].args.key: looks like",
        ),
    ],
)
def test_what_is_seldom_meant(settings: dict[str, Any], text: str) -> None:
    (sentence,) = told(**settings)
    assert text in sentence


def test_a_folder_that_others_can_read(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir(mode=0o755)
    out.chmod(0o755)
    # pytest's own folder is closed to others, and what lies below it with it.
    tops = [folder for folder in (tmp_path, *tmp_path.parents) if folder.stat().st_mode & 0o011 == 0]
    modes = {folder: folder.stat().st_mode for folder in tops}
    assert bool(told(out)) == (not tops)
    try:
        for folder in tops:
            folder.chmod(0o711)
        (sentence,) = told(out)
        assert "other users can read it" in sentence and told(out, share=True) == []
        out.chmod(0o700)
        assert told(out) == []
    finally:
        for folder, mode in modes.items():
            folder.chmod(mode & 0o777)
