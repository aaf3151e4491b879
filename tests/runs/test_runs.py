"""The run folder on a real disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import records
import torch

from rlft.errors import ConfigError
from rlft.runs.folder import Run
from rlft.runs.tables import Unreadable
from rlft.types import Best, Prompt, Rollout

CHAT = Prompt((1, 2), {"prompt": [{"role": "user", "content": "hi"}]}, 3, ({"role": "user", "content": "hi"},))
TEXT = Prompt((1, 2), {"prompt": "2+2?"}, 8, ({"role": "user", "content": "2+2?"},))


def rollout(prompt: Prompt, sample: int, logprobs: tuple[float, ...] | None = (-0.5, -0.25)) -> Rollout:
    return Rollout(prompt, (7, 2), (True, True), logprobs, f"s{sample}", "stop", sample, 11, 0)


def started(tmp_path: Path) -> Run:
    run = Run.create(tmp_path / "run")
    run.write_config("steps = 3\n")
    return run


def test_a_folder_counts_as_a_run_only_once_its_config_is_written(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "a" / "b")
    assert list(run.path.iterdir()) == []
    with pytest.raises(ConfigError, match="holds no run"):
        Run.resume(run.path)
    run.write_config("steps = 3\n")
    assert run.config.read_text() == "steps = 3\n" and run.metrics() == []
    assert Run.resume(run.path).path == run.path


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'out = ".*": holds no run; give the folder of a run'):
        Run.resume(tmp_path)


def test_an_out_that_is_a_file_or_refused_by_the_system_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r'out = ".*/file": cannot write in it: File exists; .* with --out'):
        Run.create(tmp_path / "file")
    with pytest.raises(ConfigError, match=r'out = ".*/file/sub": cannot write in it: Not a directory'):
        Run.create(tmp_path / "file" / "sub")
    with pytest.raises(ConfigError, match=r'out = "/proc/rlft": cannot write in it'):
        Run.create("/proc/rlft")


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    run = started(tmp_path)
    run.metrics_file.unlink()
    run.metrics_file.symlink_to("/dev/full")
    with pytest.raises(
        ConfigError, match=r'out = ".*run": cannot write metrics.jsonl: No space left on device; make room'
    ):
        run.log(1, {"loss": 0.5})


def test_metrics_come_back_in_order_with_their_step(tmp_path: Path) -> None:
    run = started(tmp_path)
    run.log(0, {"eval/reward": math.nan, "eval/rows": 4.0})
    run.log(1, {"loss": 0.5})
    run.log(1, {"eval/reward": 0.75})
    assert run.metrics() == [
        {"step": 0, "eval/reward": None, "eval/rows": 4.0},
        {"step": 1, "loss": 0.5},
        {"step": 1, "eval/reward": 0.75},
    ]
    first = run.first_evaluation()
    assert first.keys() == {"eval/reward", "eval/rows"} and math.isnan(first["eval/reward"])


def test_a_run_without_evaluation_has_no_first_one(tmp_path: Path) -> None:
    run = started(tmp_path)
    run.log(1, {"loss": 0.5})
    assert run.first_evaluation() == {}


def test_every_completion_is_written_with_its_rewards(tmp_path: Path) -> None:
    run = started(tmp_path)
    rows = [rollout(TEXT, 0), rollout(TEXT, 1), rollout(CHAT, 0, logprobs=None)]
    parts: dict[str, list[Any]] = {"exact": [1.0, 0.0, math.nan], "note": ["a", None, "b"]}
    # The second rollout was not run; of the third, whose prompt's tokens come first, the first token was not trained.
    logprobs = {0: torch.tensor([-0.625, -0.25]), 2: torch.tensor([0.0, 0.0, math.nan, -2.0])}
    run.write_rollouts(
        12,
        records.samples(rows, [1.0, 0.0, math.nan], parts, [0.5, -0.5, 0.0], logprobs),
        [["s", "0"], ["s", "1"], None],
    )
    path = run.path / "rollouts" / "step-000012.parquet"
    assert pq.ParquetFile(path).schema_arrow.names == [
        "step",
        "row",
        "group",
        "sample",
        "prompt",
        "prompt_is_messages",
        "data",
        "completion",
        "completion_ids",
        "sampler_logprobs",
        "logprobs",
        "pieces",
        "reward",
        "rewards/exact",
        "rewards/note",
        "advantage",
        "finish_reason",
        "tokens",
        "policy_version",
    ]
    first, second, third = run.read_rollouts(12)
    assert first == {
        "step": 12,
        "row": 8,
        "group": 0,
        "sample": 0,
        "prompt": "2+2?",
        "prompt_is_messages": False,
        "data": None,
        "completion": "s0",
        "completion_ids": [7, 2],
        "sampler_logprobs": [-0.5, -0.25],
        "logprobs": [-0.625, -0.25],
        "pieces": ["s", "0"],
        "reward": 1.0,
        "rewards/exact": 1.0,
        "rewards/note": "a",
        "advantage": 0.5,
        "finish_reason": "stop",
        "tokens": 2,
        "policy_version": 11,
    }
    assert (second["group"], second["sample"], second["rewards/note"], second["logprobs"]) == (0, 1, None, None)
    assert third["logprobs"] == [None, -2.0] and third["pieces"] is None
    assert run.read_rollouts(12, groups=1) == [first, second]
    # Messages as JSON; invalid is null, which an average in SQL leaves out, and never 0.
    assert json.loads(third["prompt"]) == [{"role": "user", "content": "hi"}] and third["group"] == 1
    assert third["prompt_is_messages"]
    assert third["reward"] is None and third["rewards/exact"] is None and third["sampler_logprobs"] is None
    assert [p.name for p in path.parent.iterdir()] == ["step-000012.parquet"]  # nothing temporary is left


def test_a_step_without_parts_and_an_evaluation_can_be_written(tmp_path: Path) -> None:
    run = started(tmp_path)
    run.write_rollouts(1, records.samples([], [], {}, []))
    run.write_evaluation(0, records.samples([rollout(TEXT, 0)], [0.5]))
    assert run.read_rollouts(1) == [] and run.rollout_steps() == [1] and run.evaluation_steps() == [0]
    assert run.read_evaluation(0)[0]["reward"] == 0.5


def test_the_newest_checkpoint_is_by_number_and_whole(tmp_path: Path) -> None:
    run = started(tmp_path)
    with pytest.raises(ConfigError, match=r'out = ".*run": holds no checkpoint yet'):
        run.latest_checkpoint()
    for name in ("step-000009", "step-1000000", "step-000100", ".saving-step-2000000", "step-best"):
        (run.checkpoints / name).mkdir(parents=True)
    assert run.latest_checkpoint().name == "step-1000000"


def test_what_lies_past_the_checkpoint_is_set_aside_and_nothing_is_deleted(tmp_path: Path) -> None:
    run = started(tmp_path)
    for step in (1, 2, 3):
        run.log(step, {"loss": float(step)})
        run.write_rollouts(step, records.samples([rollout(TEXT, 0)], [1.0], {}, [0.0]))
    run.write_evaluation(3, records.samples([rollout(TEXT, 0)], [0.5]))
    with run.metrics_file.open("a") as file:
        file.write('{"step": 4, "lo')  # killed here
    moved = run.set_aside(1)
    assert moved is not None and moved.damaged == []
    aside = moved.path
    assert aside == run.path / "set-aside" / "001"
    assert [m["step"] for m in run.metrics()] == [1] and run.rollout_steps() == [1] and run.evaluation_steps() == []
    lines = (aside / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 2, "loss": 2.0}', '{"step": 3, "loss": 3.0}', '{"step": 4, "lo']
    assert sorted(p.relative_to(aside).as_posix() for p in aside.rglob("*.parquet")) == [
        "evaluations/step-000003.parquet",
        "rollouts/step-000002.parquet",
        "rollouts/step-000003.parquet",
    ]
    run.log(2, {"loss": 9.0})
    assert run.metrics()[-1] == {"step": 2, "loss": 9.0}
    moved = run.set_aside(1)
    assert moved is not None and moved.path == run.path / "set-aside" / "002"
    assert (run.path / "set-aside" / "001" / "metrics.jsonl").read_text().splitlines() == lines


def test_a_line_without_its_end_is_torn_even_where_it_reads_as_whole(tmp_path: Path) -> None:
    run = started(tmp_path)
    run.log(1, {"loss": 1.0})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 1, "eval/reward": 0.5}')  # the disk was full here
    run.set_aside(1)
    run.log(1, {"eval/reward": 0.5})
    assert run.metrics() == [{"step": 1, "loss": 1.0}, {"step": 1, "eval/reward": 0.5}]
    assert run.evaluation(1) == {"eval/reward": 0.5} and run.evaluation(2) == {}


ROWS = [
    '{"step": null, "loss": 1}',
    '{"step": "1"}',
    '{"step": true}',
    '{"step": 1.5}',
    '{"step": -1}',
    '{"loss": 1}',
    '{"step": 1, "reward": "x"}',
    '{"step": 1, "reward": [1]}',
    "[1]",
    "\0\0\0",
    "[" * 5000,
]
"""Lines that no run has written."""


@pytest.mark.parametrize("line", ROWS)
def test_a_line_that_is_no_row_of_metrics_is_named_and_a_resume_sets_it_aside(tmp_path: Path, line: str) -> None:
    run = started(tmp_path)
    run.metrics_file.write_text(f'{{"step": 1, "loss": 1.0}}\n{line}\n{{"step": 2, "loss": 2.0}}\n')
    with pytest.raises(ConfigError, match=r"metrics.jsonl: line 2 is no row of metrics .*: fix or remove the line"):
        run.metrics()
    moved = run.set_aside(2)
    assert moved is not None and moved.damaged == [2]
    assert [row["step"] for row in run.metrics()] == [1, 2]
    assert (moved.path / "metrics.jsonl").read_text() == f"{line}\n"


@pytest.mark.parametrize("damage", ["cut", "empty", "another file", "other columns"])
def test_a_damaged_table_is_named(tmp_path: Path, damage: str) -> None:
    import pyarrow as pa

    run = started(tmp_path)
    run.write_evaluation(2, records.samples([rollout(TEXT, 0)], [1.0]))
    path = run.evaluations / "step-000002.parquet"
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "another file": b"x" * 100}.get(damage, b""))
    if damage == "other columns":
        pq.write_table(pa.table({"group": [0]}), path)
    with pytest.raises(Unreadable, match=r"evaluations/step-000002.parquet: unreadable: .*; move it out of the folder"):
        run.read_evaluation(2)


@pytest.mark.parametrize(
    ("name", "values", "found"),
    [
        ("prompt", [1], "is int64, want string"),
        ("completion", [None], "is null, want string"),
        ("reward", ["x"], "is string, want double"),
        ("pieces", [[1]], "is list of int64, want list of string"),
        ("logprobs", [["x"]], "is list of string, want list of float"),
    ],
)
def test_a_table_with_other_values_is_named(tmp_path: Path, name: str, values: list[Any], found: str) -> None:
    import pyarrow as pa

    run = started(tmp_path)
    run.write_rollouts(2, records.samples([rollout(TEXT, 0)], [1.0], {}, [0.0]))
    path = run.rollouts / "step-000002.parquet"
    table = pq.ParquetFile(path).read()
    pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(values)), path)
    with pytest.raises(Unreadable, match=f"unreadable: column {name} {found}; move it out of the folder"):
        run.read_rollouts(2)


@pytest.mark.parametrize("text", ["{", "[1]", '{"base": "x"}', "\udcff"])
def test_a_damaged_plan_is_named(tmp_path: Path, text: str) -> None:
    run = started(tmp_path)
    run.plan_file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(Unreadable, match=r"plan.json: unreadable: "):
        run.plan()


def test_nothing_past_the_checkpoint_means_nothing_is_touched(tmp_path: Path) -> None:
    run = started(tmp_path)
    run.log(1, {"loss": 1.0})
    run.log(1, {"eval/reward": 1.0})
    before = run.metrics_file.stat().st_ino
    assert run.set_aside(1) is None and not (run.path / "set-aside").exists()
    assert run.metrics_file.stat().st_ino == before


def checkpoints(run: Run, *steps: int) -> None:
    for step in steps:
        (run.checkpoints / f"step-{step:06d}").mkdir(parents=True, exist_ok=True)


def test_the_best_is_the_first_of_the_highest_rewards_whose_checkpoint_is_there(tmp_path: Path) -> None:
    run = started(tmp_path)
    for step, reward in ((0, 0.9), (1, 0.2), (2, 0.8), (3, math.nan), (4, 0.8), (5, 0.85)):
        run.log(step, {"eval/reward": reward, "eval/loss": 1.0 - step})
    assert run.best() is None  # the base, at step 0, has no checkpoint
    assert run.best(also=1) == Best(1, "eval/reward", 0.2)
    checkpoints(run, 1, 2, 3, 4)
    assert run.best() == Best(2, "eval/reward", 0.8) and run.chosen_among() == 4
    assert run.best(also=5) == Best(5, "eval/reward", 0.85)


def test_without_rewards_the_best_has_the_lowest_loss(tmp_path: Path) -> None:
    run = started(tmp_path)
    for step, loss in ((1, 2.0), (2, 1.5), (3, 1.75)):
        run.log(step, {"eval/loss": loss})
    checkpoints(run, 1, 2, 3)
    assert run.best() == Best(2, "eval/loss", 1.5)


def test_a_checkpoint_is_chosen_by_name(tmp_path: Path) -> None:
    run = started(tmp_path)
    checkpoints(run, 2, 4, 12)
    with pytest.raises(ConfigError, match=r"--checkpoint best: no checkpoint .* was evaluated; choose .* 2, 4, 12"):
        run.checkpoint("best")
    run.log(4, {"eval/reward": 0.5})
    chosen = {which: run.checkpoint(which).name for which in ("latest", "best", "2")}
    assert chosen == {"latest": "step-000012", "best": "step-000004", "2": "step-000002"}
    for wrong in ("3", "-2", "newest"):
        with pytest.raises(
            ConfigError, match=rf'--checkpoint {wrong}: .* "latest", "best" or one of its steps: 2, 4, 12'
        ):
            run.checkpoint(wrong)


def test_the_rewards_of_the_first_evaluation_come_back_by_row(tmp_path: Path) -> None:
    run = started(tmp_path)
    assert run.first_rewards() == {}
    rows = [rollout(TEXT, 0), rollout(TEXT, 1), rollout(CHAT, 0)]
    run.write_evaluation(0, records.samples(rows, [1.0, math.nan, 0.5]))
    run.write_evaluation(2, records.samples(rows, [0.0, 0.0, 0.0]))
    first = run.first_rewards()
    assert first.keys() == {8, 3} and first[3] == [0.5] and first[8][0] == 1.0 and math.isnan(first[8][1])


def test_a_metric_named_step_does_not_replace_the_step(tmp_path: Path) -> None:
    """As a user's own loss may return; a resume goes by the step."""
    run = started(tmp_path)
    run.log(3, {"loss": 1.0, "step": 1e9})
    assert run.metrics() == [{"step": 3, "loss": 1.0}]
    assert run.metrics_file.read_text() == '{"step": 3, "loss": 1.0}\n'
