"""docs/messages.md: every message a user can meet, as the source has it."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
from messages import PAGE, messages, page  # noqa: E402


def test_the_page_of_messages_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python scripts/messages.py"


def test_a_message_is_found_however_it_is_made(tmp_path: Path) -> None:
    path = tmp_path / "validate.py"
    path.write_text(
        "def f(cfg):\n"
        "    why = f'above {cfg.floor}'\n"
        "    refuse(cfg.x < 0, f'a.x = {cfg.x}: {why}')\n"
        "    if cfg.y: raise ConfigError(f'a.y = {cfg.y!r}: ' f'known: {\", \".join(known)}')\n"
        '    yield f\'{field} is {"old" if cfg.y else "new"}\'\n'
        "    error = TrainError('stop')\n"
        "    error.exit_code = 1\n"
        "    raise error\n"
        "def g():\n"
        "    return DataError(f'row {i}: {_shown(value)}')\n"
    )
    assert list(messages(path)) == [
        ("ConfigError", 2, "a.x = {x}: above {floor}"),
        ("ConfigError", 2, "a.y = {y}: known: {known, ...}"),
        ("ConfigError", 2, "{field} is [old | new]"),
        ("TrainError", 1, "stop"),
        ("DataError", 2, "row {i}: {value}"),
    ]
