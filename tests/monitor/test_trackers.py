"""Trackers, with the real packages offline: one run with all three, killed past its checkpoint and resumed, and then
what each of them wrote is read back."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sqlite3
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_tokenizer

from rlft.config.data import Data, Eval, Reward, Sampling
from rlft.config.run import Checkpoint, Config, Lora, Optim, Parity, Track
from rlft.errors import ConfigError
from rlft.monitor.trackers import tensorboard
from rlft.runs.folder import Run
from rlft.trainer.loop import train
from rlft.trainer.validate import problems

ALL = ("wandb", "trackio", "tensorboard")
LOGGED = [0, 1, 2, 2, 3, 3, 4, 4]
"""`train/global_step` of every line that was ever logged: evaluations at 0, 2 and 4, steps 1 to 4, and step 3 twice."""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny_model(seed=3).unload().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"say {i}"}) for i in range(12)))
    (folder / "rewards.py").write_text(
        "def odd(completions, log_extra=None, **kwargs):\n    return [float(len(text) % 2) for text in completions]\n"
        "def same(completions, **kwargs):\n    return [1.0] * len(completions)\n"
    )
    return folder


def config(home: Path, out: Path, **changes: Any) -> Config:
    base = Config(
        model=str(home / "model"),
        data=Data(str(home / "prompts.jsonl")),
        out=str(out),
        rewards=(Reward(f"{home}/rewards.py:odd"),),
        steps=2,
        prompts_per_step=2,
        sampling=Sampling(group_size=3, max_tokens=4),
        lora=Lora(rank=4, alpha=8),
        optim=Optim(lr=1e-2),
        parity=Parity(probe=False),
    )
    return replace(base, **changes)


def die_at(step: int) -> Callable[..., None]:
    """A callback that ends the run without a word, past its checkpoint."""

    def callback(state: Any, values: dict[str, float]) -> None:
        if state.step == step:
            raise KeyboardInterrupt

    return callback


@pytest.fixture(scope="module")
def tracked(home: Path, tmp_path_factory) -> Path:
    """Four steps with an evaluation every two, of which the third was done twice: the run died in it."""
    with pytest.MonkeyPatch.context() as patch:
        private = tmp_path_factory.mktemp("trackers")
        patch.setenv("WANDB_DATA_DIR", str(private / "wandb"))
        patch.setenv("WANDB_CONFIG_DIR", str(private / "wandb"))
        out = tmp_path_factory.mktemp("runs") / "first"
        cfg = config(
            home,
            out,
            steps=4,
            checkpoint=Checkpoint(every=2),
            eval=Eval(rows=2, every=2),
            rewards=(Reward(f"{home}/rewards.py:same"),),
            sampling=Sampling(group_size=3, max_tokens=4),
            track=Track(ALL, project="sums", mode="offline", tags=("tiny",), completions=5),
        )
        with contextlib.redirect_stdout(io.StringIO()) as said:
            with pytest.raises(KeyboardInterrupt):
                train(cfg, callbacks=[die_at(3)])
            shutil.rmtree(out / "checkpoints" / "step-000003")  # which a kill would not have left
            train(cfg, resume=True)
        # A tracker that fails is only a message: the run goes on.
        assert "step 4/4" in said.getvalue() and 'tracker "' not in said.getvalue()
        return out


# ---- W&B -----------------------------------------------------------------------------------------------------------


def wandb_records(path: Path) -> list[Any]:
    """The records of a .wandb file, which is a LevelDB log: blocks of 32 KiB of pieces (crc, length, kind)."""
    from wandb.proto import wandb_internal_pb2

    data, position, record, found = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if left < 7 or kind == 0:
            position += left
            continue
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(wandb_internal_pb2.Record())
            found[-1].ParseFromString(record)
            record = b""
    return found


def wandb_rows(path: Path) -> list[dict[str, Any]]:
    """The history of a .wandb file as dicts."""
    rows = [r.history for r in wandb_records(path) if r.WhichOneof("record_type") == "history"]
    return [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item} for row in rows]


def wandb_files(out: Path) -> list[Path]:
    """The .wandb file of every start, oldest first."""
    return sorted((out / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)


def metrics(out: Path) -> list[dict[str, Any]]:
    """Every line ever logged, those that were set aside last."""
    files = [out / "metrics.jsonl", *out.glob("set-aside/*/metrics.jsonl")]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_wandb_has_every_metric_of_every_line_against_the_global_step(tracked: Path) -> None:
    rows = [row for path in wandb_files(tracked) for row in wandb_rows(path)]
    assert sorted(row["train/global_step"] for row in rows) == LOGGED
    for line in metrics(tracked):
        wanted = {k if k.startswith("eval/") else f"train/{k}": v for k, v in line.items() if k != "step"}
        assert any(
            row["train/global_step"] == line["step"] and all(row.get(k) == v for k, v in wanted.items()) for row in rows
        ), line
    assert {"train/reward", "train/loss", "train/rewards/same/mean"} <= rows[1].keys() and "eval/reward" in rows[0]


def test_wandb_charts_everything_by_the_global_step_and_keeps_the_config(tracked: Path) -> None:
    records = wandb_records(wandb_files(tracked)[0])
    metric = [r.metric for r in records if r.WhichOneof("record_type") == "metric"]
    assert [m.step_metric for m in metric if m.glob_name == "*"] == ["train/global_step"]
    run = next(r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name, list(run.tags)) == ("sums", "first", ["tiny"])
    kept = {u.key: json.loads(u.value_json) for u in run.config.update}
    assert kept["steps"] == 4 and kept["sampling"]["group_size"] == 3 and kept["track"]["project"] == "sums"


def test_a_resumed_wandb_run_has_the_same_id_and_its_rows_go_on(tracked: Path) -> None:
    """Rows numbered on from all that were logged: W&B drops a row whose number is not above the last."""
    first, second = wandb_files(tracked)
    ids = [next(r.run for r in wandb_records(path) if r.WhichOneof("record_type") == "run") for path in (first, second)]
    assert ids[0].run_id == ids[1].run_id == json.loads((tracked / "wandb" / "rlft.json").read_text())["id"]
    assert ids[1].resume
    assert [row["train/global_step"] for row in wandb_rows(first)] == [0, 1, 2, 2, 3]
    assert [row["train/global_step"] for row in wandb_rows(second)] == [3, 4, 4]
    assert [row["_step"] for path in (first, second) for row in wandb_rows(path)] == list(range(8))


def test_wandb_has_the_completions_of_all_steps_and_the_health_messages(tracked: Path) -> None:
    seen: list[int] = []
    for path in wandb_files(tracked):
        for row in wandb_rows(path):
            name = "completions" if "train/loss" in row else "eval/completions"
            table = json.loads((path.parent / "files" / row[f"{name}/path"]).read_text())
            rows = [dict(zip(table["columns"], values, strict=True)) for values in table["data"]]
            assert {r["step"] for r in rows} == {row["train/global_step"]}
            assert len(rows) == (5 if name == "completions" else 2)  # bounded by track.completions
            assert {"prompt", "completion", "reward", "finish_reason"} <= rows[0].keys()
            if name == "completions":
                assert rows[0]["rewards/same"] == 1.0 and rows[0]["advantage"] == 0.0
                seen.append(row["train/global_step"])
    assert seen == [1, 2, 3, 3, 4]
    records = wandb_records(wandb_files(tracked)[0])
    assert "equal_rewards" in [r.alert.title for r in records if r.WhichOneof("record_type") == "alert"]
    assert "health/path" in next(row for row in wandb_rows(wandb_files(tracked)[0]) if "train/loss" in row)


# ---- Trackio, TensorBoard ------------------------------------------------------------------------------------------


def test_trackio_has_one_run_with_every_line_table_and_alert(tracked: Path) -> None:
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "sums.db") as db:
        rows = db.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        alerts = db.execute("SELECT title FROM alerts").fetchall()
        (kept,) = db.execute("SELECT config FROM configs").fetchone()
    assert len({row[0] for row in rows}) == 1 and {row[1] for row in rows} == {"first"}
    assert sorted(row[2] for row in rows) == LOGGED
    read = [(step, json.loads(values)) for _, _, step, values in rows]
    losses = {m["step"]: m["loss"] for m in metrics(tracked) if "loss" in m}
    assert {step: values["train/loss"] for step, values in read if "train/loss" in values} == losses
    for step, values in read:
        name = "completions" if "train/loss" in values else "eval/completions"
        assert {row["step"] for row in values[name]["_value"]} == {step}
    assert ("equal_rewards",) in alerts and json.loads(kept)["sampling"]["group_size"] == 3


def test_tensorboard_has_every_step_once_and_the_completions(tracked: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    for name in ("loss", "reward", "entropy", "num_tokens"):
        wanted = {m["step"]: m[name] for m in metrics(tracked) if name in m}
        found = [(e.step, e.value) for e in events.Scalars(f"train/{name}")]
        assert [step for step, _ in found] == [1, 2, 3, 4]  # the third of the killed run is purged
        assert dict(found) == pytest.approx(wanted)
    assert [e.step for e in events.Scalars("eval/reward")] == [0, 2, 4]
    texts = {name: events.Tensors(f"{name}/text_summary") for name in ("completions", "health", "config")}
    assert [e.step for e in texts["completions"]] == [1, 2, 3, 3, 4]  # TensorBoard purges numbers, not texts
    shown = texts["completions"][0].tensor_proto.string_val[0].decode()
    assert "| prompt | completion | reward | rewards/same | advantage |" in shown and shown.count("\n") == 6
    assert b"every group has equal rewards" in texts["health"][0].tensor_proto.string_val[0]
    assert b'"prompts_per_step": 2' in texts["config"][0].tensor_proto.string_val[0]


def test_a_cell_of_a_markdown_table_is_one_line() -> None:
    assert tensorboard.markdown([{"a": "x|y\nz", "b": None}]) == "| a | b |\n| --- | --- |\n| x\\|y<br>z | None |"


# ---- your own, and what goes wrong ---------------------------------------------------------------------------------

OWN = """
import json
class Mine:
    def __init__(self, start):
        if start.track.project == "refused": raise OSError("no such server")
        self.file, self.start = start.folder / "mine.jsonl", start
    def log(self, step, metrics, tables, messages):
        if step == 1 and self.start.track.project == "flaky": raise OSError("network is down")
        with self.file.open("a") as file: file.write(json.dumps([step, metrics["train/reward"], len(tables)]) + "\\n")
    def finish(self, ok):
        with self.file.open("a") as file: file.write(json.dumps(["finished", ok, self.start.name]) + "\\n")
        if self.start.track.project == "flaky": raise OSError("network is still down")
class Half:
    def log(self, step, metrics, tables, messages): pass
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(OWN)
    return f"{tmp_path}/mine.py:Mine"


LOGS = """
NAMES = ["step", "loss", "reward", "num_tokens", "eval/reward", "train/global_step", "global_step", "a\\nb\\0c"]
def logs(completions, log_metric, log_extra, **kwargs):
    for name in NAMES:
        log_metric(name, 1e9)
        log_extra(name, ["x"] * len(completions))
    log_metric("infinite", float("inf"))
    for i in range(MANY):
        log_metric(f"many/{i}", i)
    return [float(len(text) % 2) for text in completions]
def quiet(completions, **kwargs):
    return [float(len(text) % 2) for text in completions]
"""
EVERY = """
import json
class Mine:
    def __init__(self, start): self.file = start.folder / "all.jsonl"
    def log(self, step, metrics, tables, messages):
        with self.file.open("a") as file: file.write(json.dumps([step, metrics]) + "\\n")
    def finish(self, ok): pass
"""


def test_a_reward_that_logs_under_our_names_changes_no_number_of_ours(home: Path, tmp_path: Path) -> None:
    """Against the same run without logs; resumed, evaluated and in the report."""
    (tmp_path / "rewards.py").write_text(LOGS.replace("MANY", "3000"))
    (tmp_path / "tracker.py").write_text(EVERY)
    timed = ("time/", "perf/", "step_time")
    ours: dict[str, list[dict[str, Any]]] = {}
    for name in ("quiet", "logs"):
        cfg = config(
            home,
            tmp_path / name,
            steps=2,
            checkpoint=Checkpoint(every=1),
            eval=Eval(rows=2, every=1),
            rewards=(Reward(f"{tmp_path}/rewards.py:{name}"),),
            track=Track((f"{tmp_path}/tracker.py:Mine",)),
        )
        with pytest.raises(KeyboardInterrupt):
            train(cfg, callbacks=[lambda _, values: values.clear(), die_at(2)])
        result = train(cfg, resume=True)
        assert result.after and result.best is not None
        assert [row["step"] for row in metrics(tmp_path / name)] == [0, 1, 1, 2, 2]
        ours[name] = [
            {k.replace(name, "f"): v for k, v in row.items() if not k.startswith(("custom/", *timed))}
            for row in metrics(tmp_path / name)
        ]
    assert ours["logs"] == ours["quiet"]
    row = next(row for row in metrics(tmp_path / "logs") if "loss" in row)
    custom = {k: v for k, v in row.items() if k.startswith("custom/")}
    names = (
        "step",
        "loss",
        "reward",
        "num_tokens",
        "eval/reward",
        "train/global_step",
        "global_step",
        "a\ufffdb\ufffdc",
    )
    assert {k: v for k, v in custom.items() if "many" not in k} == {
        **{f"custom/{name}": 1e9 for name in names},
        "custom/infinite": None,
    }
    assert len(custom) == 3000 + 9 and custom["custom/many/2999"] == 2999
    tracked = [json.loads(line)[1] for line in (tmp_path / "logs" / "all.jsonl").read_text().splitlines()]
    assert {k.removeprefix("train/"): v for k, v in tracked[1].items() if "/custom/" in k and "infinite" not in k} == {
        k: v for k, v in custom.items() if "infinite" not in k
    }
    read = Run.resume(tmp_path / "logs").read_rollouts(2)
    assert {f"rewards/logs/{name}" for name in names} <= read[0].keys() and read[0]["rewards/logs/reward"] == "x"
    page, quiet = ((tmp_path / name / "report.html").read_text() for name in ("logs", "quiet"))
    titles = [part.split("</h4>")[0].replace("quiet", "logs") for part in quiet.split("<figcaption><h4>")[1:]]
    assert len(titles) > 20 and all(f"<h4>{title}</h4>" in page for title in titles)
    assert "<h4>custom/eval/reward</h4>" in page and page.count("<h4>") <= len(titles) + 40


def lines(out: Path) -> list[Any]:
    return [json.loads(line) for line in (out / "mine.jsonl").read_text().splitlines()]


def test_a_tracker_of_your_own_is_told_of_each_step_and_whether_the_run_ended_well(
    home: Path, own: str, tmp_path: Path
) -> None:
    train(config(home, tmp_path / "a", track=Track((own,), completions=0)))
    assert [row[0] for row in lines(tmp_path / "a")] == [1, 2, "finished"]
    assert lines(tmp_path / "a")[0][2] == 0 and lines(tmp_path / "a")[-1][1:] == [True, "a"]
    with pytest.raises(KeyboardInterrupt):
        train(config(home, tmp_path / "b", track=Track((own,), name="other")), callbacks=[die_at(1)])
    assert lines(tmp_path / "b")[-1] == ["finished", False, "other"] and lines(tmp_path / "b")[0][2] == 1


def test_a_tracker_that_fails_in_mid_run_is_noted_and_the_run_goes_on(
    home: Path, own: str, tmp_path: Path, capsys
) -> None:
    result = train(config(home, tmp_path / "run", track=Track((own,), project="flaky")))
    assert result.steps == 2 and [m["step"] for m in metrics(tmp_path / "run")] == [1, 2]
    assert [row[0] for row in lines(tmp_path / "run")] == [2, "finished"]
    out = capsys.readouterr().out
    assert out.count("OSError: network is down; the run goes on, and metrics.jsonl has everything") == 1
    assert "missed 1 of 2 rows (OSError: network is down)" in out
    assert "could not be finished: OSError: network is still down" in out


def test_a_tracker_that_cannot_start_stops_the_run_before_its_folder_counts_as_one(
    home: Path, own: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"mine.py:Mine\": could not be started: OSError: no such server"):
        train(config(home, tmp_path / "run", track=Track((own,), project="refused")))
    train(config(home, tmp_path / "run", track=Track((own,), project="fine")))


def refused(home: Path, tmp_path: Path, **track: Any) -> str:
    found = problems(config(home, tmp_path / "run", track=Track(**track)))
    assert len(found) == 1, found
    return found[0]


def test_wandb_without_a_login_is_refused_at_once_instead_of_waiting_for_a_key(
    home: Path, tmp_path: Path, monkeypatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    said = refused(home, tmp_path, use=["wandb"])
    assert "not logged in to http" in said and 'track.mode = "offline"' in said and "`wandb login`" in said
    assert problems(config(home, tmp_path / "run", track=Track(("wandb",), mode="offline"))) == []


def test_unknown_trackers_and_missing_packages_say_what_to_do(
    home: Path, own: str, tmp_path: Path, monkeypatch
) -> None:
    known = ", ".join(sorted(ALL))
    assert f'Did you mean "wandb"? Known: {known};' in refused(home, tmp_path, use=["wandbb"])
    assert "Half" in (said := refused(home, tmp_path, use=[own.replace("Mine", "Half")])) and "lacks finish" in said
    monkeypatch.setattr("rlft.monitor.tracking.version", lambda package: None)
    said = refused(home, tmp_path, use=["trackio"])
    assert said == "track.use = \"trackio\": trackio is not installed: pip install 'trackio>=0.40'"
    monkeypatch.setattr("rlft.monitor.tracking.version", lambda package: "0.12.1")
    said = refused(home, tmp_path, use=["wandb"], mode="offline")
    assert said == "track.use = \"wandb\": wandb 0.12.1 is too old: pip install -U 'wandb>=0.31'"


def test_settings_that_the_chosen_trackers_do_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"track.tags and track.mode = .*for W&B, and track.use is \['trackio'\]"):
        Track(("trackio",), tags=("a",), mode="offline")
    with pytest.raises(ConfigError, match=r"track.use = \['wandb', 'wandb'\]: name each tracker once"):
        Track(("wandb", "wandb"))
