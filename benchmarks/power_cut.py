"""A power cut at every moment of a small run: what had reached the disk by then is resumed, and ends equal.

    python benchmarks/power_cut.py            # every kind of run of kill_soak.py, about ten minutes on two cores

One undisturbed run in a process of its own records what every fsync makes durable: the bytes of a file, or the entries
of a folder. After each fsync the power may fail, and the disk then holds one of two things:

    strict   only what was synced: a file has the bytes of its last fsync, a folder the entries of its last one
    torn     every entry that there is, as many file systems order it, with files cut to the bytes of their last fsync

Each is rebuilt in a folder of its own and resumed to the end. `tests/runs/test_power_cut.py` does a few of them.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from kill_soak import KINDS, ROOT, Fork, Run, differences, make_home

MOST = 12
"""Cuts of each kind of run and disk that are tried."""
Tree = dict[str, "Tree | bytes"]
"""Name -> the bytes of a file, or a folder."""


@dataclass
class Disk:
    """What of a folder has reached the disk, kept up by a function in the place of os.fsync."""

    root: Path
    cuts: list[dict[str, Tree]] = field(default_factory=list)
    """After each fsync: kind of disk -> what it would hold."""
    _bytes: dict[int, bytes] = field(default_factory=dict)
    """Inode of a file -> its bytes at the last fsync."""
    _entries: dict[int, dict[str, tuple[int, bool]]] = field(default_factory=dict)
    """Inode of a folder -> name -> inode at the last fsync, and whether it was a folder: inodes are used again."""

    def synced(self, handle: int) -> None:
        """Record what an fsync of this descriptor makes durable."""
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path != self.root.parent and not path.is_relative_to(self.root):
            return
        inode = os.fstat(handle).st_ino
        if path.is_dir():
            self._entries[inode] = {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(path)}
        else:
            self._bytes[inode] = path.read_bytes()
        if self.root.exists():
            at = self.root.stat().st_ino
            self.cuts.append({"strict": self._strict(at), "torn": self._torn(self.root)})

    def _strict(self, inode: int) -> Tree:
        return {
            name: self._strict(entry) if is_folder else self._bytes.get(entry, b"")
            for name, (entry, is_folder) in self._entries.get(inode, {}).items()
        }

    def _torn(self, folder: Path) -> Tree:
        tree: Tree = {}
        for entry in os.scandir(folder):
            is_folder = entry.is_dir()
            tree[entry.name] = self._torn(Path(entry.path)) if is_folder else self._bytes.get(entry.inode(), b"")
        return tree


def rebuild(tree: Tree, folder: Path) -> None:
    """Write the folder that a disk holds."""
    folder.mkdir()
    for name, content in tree.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            rebuild(content, folder / name)


def recorded(run: Run, out: Path) -> None:
    """Train a run to its end in this process, and write what each of its power cuts leaves to `out`."""
    import pickle

    from rlft.cli.main import main

    disk, fsync = Disk(run.out), os.fsync

    def record(handle: int) -> None:
        fsync(handle)
        disk.synced(handle)

    os.fsync = record
    try:
        assert main(["train", str(run.file)]) == 0
    finally:
        os.fsync = fsync
    out.write_bytes(pickle.dumps(disk.cuts))


def cuts_of(home: Path, kind: str) -> tuple[Run, list[dict[str, Tree]]]:
    """Return an undisturbed run of this kind, and what each power cut leaves of it."""
    import pickle

    run, file = Run(home, f"whole-{kind}", kind=kind), home / f"cuts-{kind}"
    env = {**os.environ, "KILL_SOAK_MARKS": str(run.marks), "PYTHONPATH": str(ROOT)}
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from pathlib import Path\nfrom kill_soak import Run\nfrom power_cut import recorded\n"
        f"recorded(Run(Path({str(home)!r}), {run.out.name!r}, kind={kind!r}), Path({str(file)!r}))\n"
    )
    subprocess.run([sys.executable, "-c", code], env=env, check=True, stdout=subprocess.DEVNULL)
    return run, pickle.loads(file.read_bytes())


def resumed(home: Path, name: str, kind: str, tree: Tree, start: Any = None) -> Run:
    """Resume what a power cut left, to the end."""
    run = Run(home, name, **({"start": start} if start else {}), kind=kind)
    shutil.rmtree(run.out, ignore_errors=True)
    rebuild(tree, run.out)
    run.finish()
    return run


def held(tree: Tree) -> str:
    """What is worth telling of what a cut left."""
    checkpoints = tree.get("checkpoints", {})
    steps = [name for name in checkpoints if name.startswith("step-")] if isinstance(checkpoints, dict) else []
    return f"{max(steps, default='no checkpoint')}, {'a' if tree.get('metrics.jsonl') else 'no'} metrics.jsonl"


def main() -> None:
    """Cut, resume and compare runs of every kind."""
    from results_file import write

    rows, rng, left = [], random.Random(0), Counter()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        make_home(home)
        for kind in KINDS:
            began = time.monotonic()
            whole, cuts = cuts_of(home, kind)
            for disk in ("strict", "torn"):
                picked = sorted(rng.sample(range(len(cuts)), min(MOST, len(cuts))))
                for number in picked:
                    run = resumed(home, f"{kind}-{disk}-{number}", kind, cuts[number][disk], Fork)
                    found = differences(whole.out, run.out)
                    assert found == [], f"{kind}, {disk}, cut {number}: {found}"
                    left[held(cuts[number][disk])] += 1
                    shutil.rmtree(run.out)
                print(f"{kind}, {disk}: {len(picked)} of {len(cuts)} cuts resumed and ended equal", flush=True)
                rows.append(
                    {
                        "work": f"power_cut/{kind}/{disk}",
                        "stack": "rlft",
                        "metric": "equal",
                        "value": len(picked),
                        "unit": "cuts that ended equal",
                        "note": f"of {len(cuts)} moments after an fsync, {len(picked)} drawn; "
                        f"{time.monotonic() - began:.0f} s",
                    }
                )
    for what, count in left.most_common():
        rows.append(
            {"work": "power_cut/left", "stack": "rlft", "metric": what, "value": count, "unit": "cuts", "note": ""}
        )
    print(write("power_cut", rows))


if __name__ == "__main__":
    main()
