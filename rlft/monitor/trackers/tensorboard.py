"""TensorBoard: event files in the run folder, shown by `tensorboard --logdir RUN/tensorboard`.

A resumed run purges the numbers logged past the checkpoint, so the curves continue without a break; texts (completions)
of those steps are shown twice.
"""

from __future__ import annotations

import json
from typing import Any

from rlft.monitor.trackers import Start

PACKAGE, SINCE = "tensorboard", "2.0"


class Tracker:
    """The TensorBoard tracker of one run."""

    def __init__(self, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = start.step + 1 if start.resumed else None
        self.writer = SummaryWriter(str(start.folder / "tensorboard"), purge_step=purge)
        self.writer.add_text("config", f"```\n{json.dumps(start.config, indent=1, default=str)}\n```", start.step)

    def log(self, step: int, metrics: dict[str, float], tables: dict[str, list[dict]], messages: Any) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        for name, rows in tables.items():
            self.writer.add_text(name, markdown(rows), step)
        if messages:
            self.writer.add_text("health", "\n\n".join(f"**{item.name}** {item.text}" for item in messages), step)
        self.writer.flush()

    def finish(self, ok: bool) -> None:
        self.writer.close()


def markdown(rows: list[dict]) -> str:
    """Return a table in Markdown, with line breaks and bars in cells escaped."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    cells = ([cell.replace("|", "\\|").replace("\n", "<br>") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
