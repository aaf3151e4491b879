"""The page of models says what the tests run."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_of_models_is_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "models.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["page"](), "run: python scripts/models.py"
