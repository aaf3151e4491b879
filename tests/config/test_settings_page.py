"""The page of settings says what the config has."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_of_settings_is_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "settings.py"))
    text = script["page"]()
    assert script["PAGE"].read_text(encoding="utf-8") == text, "run: python scripts/settings.py"
    assert "| `kl_coef` | number | `0.0` |" in text and "| `group_size` |" in text
    settings = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert [name for name, *_, what in settings if not what.strip(" |")] == [], "settings without a docstring"
