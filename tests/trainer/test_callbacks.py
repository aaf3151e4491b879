"""Callbacks: each event with its view, stopping, saving, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

import rlft
from rlft.errors import ConfigError, TrainError


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("callbacks")
    tiny.save_tiny(folder / "model")
    (folder / "data.jsonl").write_text("".join(f'{{"prompt": "say {i}"}}\n' for i in range(8)))
    return folder


def train(home: Path, out: Path, callbacks: Any, **settings: Any) -> rlft.Result:
    cfg = rlft.Config(
        model=str(home / "model"),
        data=str(home / "data.jsonl"),
        out=str(out),
        steps=3,
        prompts_per_step=2,
        sampling=rlft.Sampling(group_size=2, max_tokens=4),
        eval=rlft.Eval(rows=2, every=2),
        parity=rlft.Parity(probe=False),
    )
    rewards = [lambda completions, **_: [float(len(text) % 3) for text in completions]]
    return rlft.train(cfg, rewards=rewards, callbacks=callbacks, **settings)


class Seen(rlft.Callback):
    """Notes every event."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.views: dict[str, rlft.View] = {}

    def note(self, name: str, run: rlft.View) -> None:
        self.events.append((name, run.step))
        self.views[name] = run

    def on_start(self, run: rlft.View) -> None:
        self.note("start", run)

    def on_rollouts(self, run: rlft.View) -> None:
        self.note("rollouts", run)

    def on_step(self, run: rlft.View) -> None:
        self.note("step", run)

    def on_evaluate(self, run: rlft.View) -> None:
        self.note("evaluate", run)

    def on_save(self, run: rlft.View) -> None:
        self.note("save", run)

    def on_end(self, run: rlft.View) -> None:
        self.note("end", run)


def test_every_event_comes_once_and_in_order(home: Path, tmp_path: Path) -> None:
    seen = Seen()
    result = train(home, tmp_path / "run", [seen])
    events = [event for event in seen.events if event != ("save", 2)]  # where the evaluation was the best
    assert events == [
        ("start", 0), ("evaluate", 0), ("rollouts", 0), ("step", 1), ("rollouts", 1), ("step", 2), ("evaluate", 2),
        ("rollouts", 2), ("step", 3), ("save", 3), ("evaluate", 3), ("end", 3),
    ]  # fmt: skip
    step, end = seen.views["step"], seen.views["end"]
    assert (step.out, step.steps, len(step.samples)) == (result.out, 3, 4) and "loss" in step.metrics
    assert seen.views["rollouts"].samples[0].reward is not None and not seen.views["rollouts"].metrics
    assert end.checkpoint == result.adapter and end.metrics["eval/reward"] == result.after["eval/reward"]


def test_a_callback_may_stop_and_save(home: Path, tmp_path: Path, capsys) -> None:
    class Twice(rlft.Callback):
        def on_step(self, run: rlft.View) -> None:
            run.save() if run.step == 1 else run.stop()

    result = train(home, tmp_path / "run", [Twice()])
    assert result.interrupted and result.steps == 2 and "Go on with" in capsys.readouterr().out
    assert min(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")) == "step-000001"
    assert not train(home, tmp_path / "run", [], resume=True).interrupted


def test_a_plain_function_gets_state_and_metrics(home: Path, tmp_path: Path) -> None:
    seen = []
    train(home, tmp_path / "run", [lambda state, metrics: seen.append((state.step, "loss" in metrics))])
    assert seen == [(1, True), (2, True), (3, True)]


def test_one_that_raises_is_named_and_loses_no_step(home: Path, tmp_path: Path) -> None:
    class Picky(rlft.Callback):
        def on_rollouts(self, run: rlft.View) -> None:
            if run.step == 1:
                raise KeyError("answer")

    with pytest.raises(TrainError, match="callback Picky raised at step 1: KeyError: 'answer'") as raised:
        train(home, tmp_path / "run", [Picky()])
    assert raised.value.exit_code == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 1
    assert (tmp_path / "run" / "checkpoints" / "step-000001").is_dir()


class Awaited(rlft.Callback):
    async def on_step(self, run: rlft.View) -> None: ...


async def awaited(state: Any, metrics: Any) -> None: ...


class Silent(Exception):
    """Raises when asked what it says."""

    def __str__(self) -> str:
        raise RuntimeError


def test_one_whose_error_cannot_be_shown_is_named(home: Path, tmp_path: Path) -> None:
    def raises(state: Any, metrics: Any) -> None:
        raise Silent

    with pytest.raises(TrainError, match="callback raises raised at step 1: Silent: <Silent whose str raises>; mend"):
        train(home, tmp_path / "run", [raises])


@pytest.mark.parametrize("callbacks", [Seen(), len, None, "abc", {}])
def test_what_is_no_list_of_callbacks_is_refused(callbacks: Any, home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"callbacks: a \w+ is no list of them: give \[callback\]"):
        train(home, tmp_path / "run", callbacks)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("callback", "why"),
    [
        (Seen, "is a class"),
        (3, "is no callback"),
        (None, "is no callback"),
        (awaited, "awaited is async, and a callback is called, not awaited"),
        (Awaited(), "Awaited is async, and a callback is called, not awaited"),
    ],
)
def test_what_is_no_callback_is_refused_before_anything_is_loaded(
    callback: Any, why: str, home: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=why):
        train(home, tmp_path / "run", [callback])
    assert not (tmp_path / "run").exists()
