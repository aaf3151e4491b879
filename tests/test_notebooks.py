"""The notebooks run from top to bottom on the real small model, and the number that each asserts is reached."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
QUICK = "your_own_reward"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["first_run", "from_trl", "your_own_reward"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert any("assert " in cell.source for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem == QUICK else [pytest.mark.slow], id=path.stem) for path in NOTEBOOKS],
)
def test_a_notebook_runs(path: Path, smollm2: Path, tmp_path: Path, monkeypatch) -> None:
    """In a process of its own, as Jupyter runs it. A cell that raises fails the test with its traceback."""
    monkeypatch.setenv("RLFT_NOTEBOOK_MODEL", str(smollm2))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any(output.output_type == "stream" for output in shown)
