"""Progress bars of other libraries: off in a log and under a live view, and afterwards as the user had them."""

from __future__ import annotations

import os
import sys

import datasets
import huggingface_hub.utils as hub
import pytest
from transformers.utils import logging

from rlft.cli import main as cli
from rlft.environment import without_bars, without_tqdm


def states() -> tuple[bool, bool, bool]:
    return (
        logging.is_progress_bar_enabled(),
        not hub.are_progress_bars_disabled(),
        not datasets.are_progress_bars_disabled(),
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_bars_are_off_where_they_fill_a_log_and_restored(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    before = states()
    assert before == (True, True, True)
    with without_bars():
        assert states() == (terminal,) * 3
    with pytest.raises(ValueError), without_bars(always=True):
        assert states() == (False,) * 3
        raise ValueError
    assert states() == before


def test_what_the_user_has_switched_off_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    datasets.disable_progress_bars()
    try:
        with without_bars():
            pass
        assert states() == (True, True, False)
    finally:
        datasets.enable_progress_bars()


def test_tqdm_is_switched_off_for_the_imports_of_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with without_tqdm():
        assert os.environ["TQDM_DISABLE"] == "1"
    assert "TQDM_DISABLE" not in os.environ
    monkeypatch.setenv("TQDM_DISABLE", "0")  # the user's
    with without_tqdm():
        assert os.environ["TQDM_DISABLE"] == "0"
    assert os.environ["TQDM_DISABLE"] == "0"


def test_no_command_draws_the_bar_of_a_gguf_file_into_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for name in ("eval", "generate", "export-base"):
        seen_by = cli.COMMANDS[name]._replace(run=lambda args: seen.append(os.environ.get("TQDM_DISABLE")) or 0)
        monkeypatch.setitem(cli.COMMANDS, name, seen_by)
        assert cli.main([name]) == 0
    assert seen == ["1"] * 3 and "TQDM_DISABLE" not in os.environ
