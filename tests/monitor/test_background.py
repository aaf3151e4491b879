"""The writing thread: order, waiting, errors, and that a checkpoint has the completions before it."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tiny import tiny_model, tiny_tokenizer

from rlft.config.data import Data
from rlft.config.run import Algo, Checkpoint, Config, Lora, Parity
from rlft.errors import ConfigError
from rlft.monitor.background import PENDING, Background
from rlft.trainer.loop import train


def fail() -> None:
    raise OSError("no space left")


def test_calls_are_done_in_order_and_flush_waits_for_all_of_them() -> None:
    done: list[int] = []
    with Background("t") as background:
        for i in range(200):  # more than may wait: submit waits then
            background.submit(lambda i=i: done.append(i))
        assert background.flush() and done == list(range(200))
        background.submit(lambda: done.append(200))
    assert done[-1] == 200  # leaving waits too


def test_a_full_queue_refuses_an_offer_and_a_flush_with_a_limit_gives_up() -> None:
    gate = threading.Event()
    background = Background("t")
    background.submit(gate.wait)  # type: ignore[arg-type]
    time.sleep(0.05)  # it is taken from the queue
    assert all(background.offer(lambda: None) for _ in range(PENDING)) and not background.offer(lambda: None)
    assert not background.flush(0.01)
    gate.set()
    assert background.flush(5)
    background.stop()


def test_what_a_call_raises_comes_out_once_at_the_next_one_or_on_leaving() -> None:
    background = Background("t")
    background.submit(fail)
    with pytest.raises(OSError, match="no space left"):
        background.flush()
    assert background.flush()
    with pytest.raises(OSError, match="no space left"), Background("t") as other:
        other.submit(fail)
    with pytest.raises(KeyError), Background("t") as third:  # the error that is on its way is the one to see
        third.submit(fail)
        raise KeyError("first")
    background.stop()


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    tiny_model(seed=3).unload().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(9)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Config(
        model=str(tmp_path / "model"),
        data=Data(str(tmp_path / "data.jsonl")),
        out=str(tmp_path / "run"),
        steps=3,
        prompts_per_step=2,
        lora=Lora(rank=4, alpha=8),
        parity=Parity(probe=False),
        checkpoint=Checkpoint(every=1),
        algo=Algo("sft"),
    )


def test_a_checkpoint_waits_for_the_completions_of_the_steps_before_it(cfg: Config, monkeypatch) -> None:
    write = pq.write_table

    def slow(*arguments: Any, **options: Any) -> None:
        time.sleep(0.3)
        write(*arguments, **options)

    monkeypatch.setattr(pq, "write_table", slow)
    out, seen = Path(cfg.out), []

    def look(state: Any, values: dict[str, float]) -> None:
        seen.append([sorted(path.stem for path in (out / name).glob("step-*")) for name in ("checkpoints", "rollouts")])

    train(cfg, callbacks=[look])
    saved = ["step-000001", "step-000002"]
    assert seen == [[[], []], [saved[:1], saved[:1]], [saved, saved]]


def test_completions_that_cannot_be_written_stop_the_run(cfg: Config) -> None:
    def in_the_way(state: Any, values: dict[str, float]) -> None:
        if state.step == 1:
            (Path(cfg.out) / "rollouts" / ".step-000002.parquet.tmp").mkdir(parents=True)

    with pytest.raises(
        ConfigError,
        match=r"cannot write rollouts/step-000002.parquet: .*Is a directory.*; see what is in the way there",
    ):
        train(cfg, callbacks=[in_the_way])
