"""Checkpoints: what is saved comes back, a kill leaves the last one usable, and one that does not fit is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlft.errors import ConfigError
from rlft.runs import checkpoint
from rlft.types import State

IDENTITY = {"model": "m", "base": "f00d", "lora": "rank 4", "rlft": "0.1.0"}


def write_adapter(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_bytes(b"card")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_bytes(b"words")


def tensors(value: float = 1.0) -> dict[str, Tensor]:
    return {
        "adapter": torch.full((3, 2), value),
        "optim.step": torch.tensor(4.0),
        "view": torch.arange(6.0).view(2, 3).T,
        "rng": torch.get_rng_state(),
    }


def save(root: Path, step: int, keep: int = 2, identity: dict[str, str] = IDENTITY) -> Path:
    return checkpoint.save_checkpoint(
        root, State(step=step, updates=step), tensors(step), identity, write_adapter, keep
    )


def test_state_and_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    state = State(step=12, updates=24, consumed=96, num_tokens=1000, skipped_updates=1, invalid_history=[0.0, 0.1])
    path = checkpoint.save_checkpoint(tmp_path / "c", state, tensors(0.1), IDENTITY, write_adapter, keep=2)
    assert path == tmp_path / "c" / "step-000012"
    names = ["README.md", "adapter_model.safetensors", "state.json", "tokenizer", "trainer.safetensors"]
    assert sorted(p.name for p in path.iterdir()) == names
    assert [p.relative_to(path).as_posix() for p in checkpoint.portable(path)] == [
        "adapter_model.safetensors",
        "tokenizer/vocab.txt",
    ]
    back, found, notes = checkpoint.load_checkpoint(path, IDENTITY)
    assert back == state and notes == [] and found.keys() == tensors().keys()
    for name, tensor in tensors(0.1).items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


def test_the_oldest_beyond_keep_go_and_leftovers_of_kills_too(tmp_path: Path) -> None:
    for name in (".saving-step-000002", ".discarded-step-000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_bytes(b"x")
    (tmp_path / "notes").mkdir()
    for step in (9, 10, 11):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step-000010", "step-000011"]


def test_a_step_that_is_saved_stays_as_it_is(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    inode = (path / "state.json").stat().st_ino
    assert save(tmp_path, 3) == path and (path / "state.json").stat().st_ino == inode


def test_a_save_that_was_killed_while_removing_the_old_one_is_finished_by_the_next(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    (tmp_path / ".discarded-step-000000").mkdir()
    save(tmp_path, 3, keep=2)  # resumed at its end: there is nothing to write
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]


SCRIPT = """
import os, signal, sys, torch
from pathlib import Path
from rlft.runs import checkpoint
from rlft.types import State

root, where = Path(sys.argv[1]), sys.argv[2]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
identity = {"model": "m", "base": "f00d", "lora": "rank 4", "rlft": "0.1.0"}

def adapter(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"half")
    if where == "in write_adapter":
        die()

checkpoint.save_checkpoint(root, State(step=1), {"adapter": torch.ones(3)}, identity, lambda folder: None, keep=1)
if where == "between files":
    # The process dies when it comes to write the second of its own files.
    write_text = Path.write_text
    Path.write_text = lambda self, *a, **k: die() if self.name == "state.json" else write_text(self, *a, **k)
if where == "before the rename":
    Path.rename = die
if where == "removing the old one":
    checkpoint.shutil.rmtree = lambda path: ((path / "state.json").unlink(), die())
checkpoint.save_checkpoint(root, State(step=2), {"adapter": torch.full((3,), 2.0)}, identity, adapter, keep=1)
"""


@pytest.mark.parametrize(
    ("where", "newest"),
    [("in write_adapter", 1), ("between files", 1), ("before the rename", 1), ("removing the old one", 2)],
)
def test_a_kill_during_a_save_leaves_a_checkpoint_usable(tmp_path: Path, where: str, newest: int) -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), where], cwd=Path(__file__).parents[2])
    assert run.returncode == -signal.SIGKILL
    named = sorted(p.name for p in tmp_path.glob("step-*"))
    assert named == [f"step-{newest:06d}"]
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")], "the kill came too late to test anything"
    state, found, _ = checkpoint.load_checkpoint(tmp_path / named[-1], IDENTITY)
    assert state.step == newest and torch.equal(found["adapter"], torch.full((3,), float(newest)))
    # The resumed run comes to the same step again, over what the kill left.
    save(tmp_path, newest + 1, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == [f"step-{newest + 1:06d}"]


def test_another_base_or_adapter_shape_is_refused_with_both_values(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    want = (
        r"does not fit this run: base of the checkpoint is 'f00d' \(model 'm'\), here it is 'beef' \(model 'other'\); "
    )
    with pytest.raises(ConfigError, match=want + r".* --out"):
        checkpoint.load_checkpoint(path, {**IDENTITY, "base": "beef", "model": "other"})
    with pytest.raises(ConfigError, match=r"lora of the checkpoint is 'rank 4'.* here it is 'rank 8'"):
        checkpoint.load_checkpoint(path, {**IDENTITY, "lora": "rank 8"})
    with pytest.raises(ConfigError, match="extra of the checkpoint is None"):
        checkpoint.load_checkpoint(path, {**IDENTITY, "extra": "x"})


def change(path: Path, **changes: object) -> None:
    """Write another state.json as rlft itself would, so with its digest."""
    record = json.loads((path / "state.json").read_text())
    record = {**record, **changes}
    del record["digest"]
    record["digest"] = checkpoint._digest_of_record(record)
    (path / "state.json").write_text(json.dumps(record))


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    change(path, format=1)
    with pytest.raises(
        ConfigError, match=r"in format 1, and this rlft reads format 2; use the rlft that wrote it \(0.1.0\)"
    ):
        checkpoint.load_checkpoint(path, IDENTITY)


def test_other_versions_and_another_name_of_the_same_base_are_notes(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    change(path, versions={"torch": "1.0", "transformers": None, "peft": checkpoint._versions()["peft"]})
    _, _, notes = checkpoint.load_checkpoint(path, {**IDENTITY, "model": "moved", "rlft": "0.2.0"})
    now = checkpoint._versions()
    tail = "results may differ in the last bits"
    assert notes == [
        f"the checkpoint was made with torch 1.0, this is {now['torch']}: {tail}",
        f"the checkpoint was made with transformers None, this is {now['transformers']}: {tail}",
        "model of the checkpoint is m, here it is moved",
        "rlft of the checkpoint is 0.1.0, here it is 0.2.0",
    ]


def test_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"step-000001: no checkpoint there"):
        checkpoint.load_checkpoint(tmp_path / "step-000001", IDENTITY)


@pytest.mark.parametrize(
    ("file", "data", "why"),
    [
        ("state.json", b'{"format": 2, "sta', "Unterminated string"),
        ("state.json", b"[" * 5000, "recursion"),
        ("state.json", b"\xff", "codec can't decode"),
        ("adapter_model.safetensors", b"wei", "adapter_model.safetensors is not what was written"),
        ("adapter_model.safetensors", None, "adapter_model.safetensors: No such file"),
        ("tokenizer/vocab.txt", b"", "tokenizer/vocab.txt is not what was written"),
        ("state.json", b"[]", "state.json lacks entries"),
        ("trainer.safetensors", b"short", "trainer.safetensors is not what was written"),
        ("trainer.safetensors", None, "No such file"),
        ("state.json", None, "No such file"),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, file: str, data: bytes | None, why: str) -> None:
    path = save(tmp_path, 1)
    (path / file).unlink()
    if data is not None:
        (path / file).write_bytes(data)
    with pytest.raises(ConfigError, match=rf"step-000001: damaged checkpoint: .*{why}.*; remove that folder"):
        checkpoint.load_checkpoint(path, IDENTITY)


EDITS = {"step": 99, "updates": -1, "consumed": "x", "invalid_history": None, "solved": [1], "new": 1}
"""Field of the state -> a value that somebody has put there."""


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_state_is_a_damaged_checkpoint(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    record = json.loads((path / "state.json").read_text())
    record["state"][name] = EDITS[name]
    (path / "state.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"step-000001: damaged checkpoint: state.json is not what was written"):
        checkpoint.load_checkpoint(path, IDENTITY)


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(tmp_path: Path) -> None:
    path = save(tmp_path, 1).rename(tmp_path / "step-000099")
    with pytest.raises(ConfigError, match="step-000099: damaged checkpoint: its state is of step 1"):
        checkpoint.load_checkpoint(path, IDENTITY)


def test_the_card_may_change(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "README.md").write_bytes(b"another card")
    state, _, _ = checkpoint.load_checkpoint(path, IDENTITY)
    assert state.step == 1


def test_of_regular_checkpoints_as_many_are_kept_as_asked_for_and_of_others_only_the_newest(tmp_path: Path) -> None:
    left = []
    for step in (5, 10, 13, 15, 17, 18):
        checkpoint.save_checkpoint(tmp_path, State(step=step), tensors(), IDENTITY, write_adapter, keep=2, every=5)
        left.append([int(path.name[5:]) for path in sorted(tmp_path.iterdir())])
    assert left == [[5], [5, 10], [10, 13], [10, 15], [15, 17], [15, 18]]


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "trainer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="not what was written"):
        checkpoint.load_checkpoint(path.parent, IDENTITY)


def test_truncated_tensors_are_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "trainer.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ConfigError, match=r"step-000001: damaged checkpoint: .*not what was written; remove that fold"):
        checkpoint.load_checkpoint(path.parent, IDENTITY)


def test_a_state_with_unknown_fields_is_damaged(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    change(path, state={"step": 1, "stpe": 2})
    with pytest.raises(ConfigError, match=r"damaged checkpoint: .*stpe"):
        checkpoint.load_checkpoint(path, IDENTITY)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"step-000001: the checkpoint could not be written: .* with --resume"):
        save(tmp_path / "file", 1)
