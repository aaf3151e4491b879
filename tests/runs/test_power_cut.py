"""The power fails after an fsync: what had reached the disk resumes to an equal end (`benchmarks/power_cut.py`)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from kill_soak import Run, differences, make_home
from power_cut import Disk, Tree, rebuild

from rlft.cli.main import main
from rlft.runs.disk import replace_file


class InProcess:
    """A run in this process, as `kill_soak.Run` wants it."""

    pid = 0

    def __init__(self, args: list[str], marks: Path) -> None:
        os.environ["KILL_SOAK_MARKS"] = str(marks)
        self._code = main(args)

    def poll(self) -> int:
        return self._code

    def kill(self) -> None:
        raise AssertionError

    def wait(self) -> int:
        return self._code


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Tree]]]:
    """A finished run in HOME/whole, and what each power cut leaves of it."""
    home = tmp_path_factory.mktemp("power")
    make_home(home)
    run, fsync = Run(home, "whole", InProcess), os.fsync
    disk = Disk(run.out)

    def record(handle: int) -> None:
        fsync(handle)
        disk.synced(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", record)
        run.finish()
    return home, disk.cuts


def checkpoints(tree: Tree) -> list[str]:
    folder: Any = tree.get("checkpoints", {})
    return sorted(name for name in folder if name.startswith("step-"))


def test_what_a_durable_checkpoint_builds_on_is_durable_too(cuts: tuple[Path, list[dict[str, Tree]]]) -> None:
    """In a cut that has step 4: all of its files, and every row and file of the four steps before it."""
    home, trees = cuts
    whole = home / "whole"
    seen = 0
    for tree in (cut[disk] for cut in trees for disk in ("strict", "torn")):
        for name in checkpoints(tree):
            step, folder = int(name[5:]), tree["checkpoints"]
            assert isinstance(folder, dict) and isinstance(folder[name], dict)
            assert all(content for content in folder[name].values()), f"{name} has empty files"
            assert "state.json" in folder[name] and "tokenizer_config.json" in folder[name]
            lines = tree["metrics.jsonl"]
            assert isinstance(lines, bytes)
            assert lines.count(b'"loss"') >= step, f"{name} beside {lines.count(b'loss')} rows of metrics"
            for kind, steps in (("rollouts", range(1, step + 1)), ("evaluations", range(0, step, 2))):
                files = tree[kind]
                assert isinstance(files, dict)
                for other in steps:
                    path = f"step-{other:06d}.parquet"
                    assert files[path] == (whole / kind / path).read_bytes(), f"{name} without {kind}/{path}"
            assert tree["config.toml"] == (whole / "config.toml").read_bytes()
            seen += 1
    assert seen > 20


@pytest.mark.slow
@pytest.mark.parametrize("disk", ["strict", "torn"])
@pytest.mark.parametrize("part", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_the_rest_is_done_again(
    disk: str, part: float, cuts: tuple[Path, list[dict[str, Tree]]], tmp_path: Path
) -> None:
    home, trees = cuts
    run = Run(home, tmp_path.name, InProcess)
    rebuild(trees[int(part * len(trees))][disk], run.out)
    run.finish()
    assert differences(home / "whole", run.out) == []


def test_a_cut_before_the_first_checkpoint_resumes(cuts: tuple[Path, list[dict[str, Tree]]], tmp_path: Path) -> None:
    home, trees = cuts
    tree = next(cut["strict"] for cut in reversed(trees) if not checkpoints(cut["strict"]))
    run = Run(home, tmp_path.name, InProcess)
    rebuild(tree, run.out)
    run.finish()
    assert differences(home / "whole", run.out) == []


def test_the_model_of_a_disk_loses_what_was_not_synced(tmp_path: Path, monkeypatch) -> None:
    root, fsync = tmp_path / "run", os.fsync
    disk = Disk(root)
    monkeypatch.setattr(os, "fsync", lambda handle: (fsync(handle), disk.synced(handle)))
    root.mkdir()
    replace_file(root / "durable", b"old")
    (root / "entry").write_bytes(b"lost")
    replace_file(root / "later", b"new")
    (root / "durable").write_bytes(b"overwritten")
    handle = os.open(root / "later", os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    assert disk.cuts[-1]["strict"] == {"durable": b"old", "entry": b"", "later": b"new"}
    (root / "unknown").write_bytes(b"lost")
    (root / "later").unlink()
    replace = disk._torn(root)
    assert replace == {"durable": b"old", "entry": b"", "unknown": b""}
