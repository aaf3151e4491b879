"""Trackio: a local database (TRACKIO_DIR, or Hugging Face's cache), shown by `trackio show`; no account needed.

A resumed run continues under the same name; steps past the checkpoint are logged again with the same step number.
"""

from __future__ import annotations

from typing import Any

from rlft.monitor.trackers import Start

PACKAGE, SINCE = "trackio", "0.40"


class Tracker:
    """The Trackio tracker of one run."""

    def __init__(self, start: Start) -> None:
        import trackio

        self.trackio = trackio
        self.project = start.track.project or "rlft"
        self.run = trackio.init(
            project=self.project,
            name=start.name,
            group=start.track.group,
            config=start.config,
            resume="allow" if start.resumed else "never",
            embed=False,
        )

    def log(self, step: int, metrics: dict[str, float], tables: dict[str, list[dict]], messages: Any) -> None:
        panels = {name: self.trackio.Table(columns=list(rows[0]), data=rows) for name, rows in tables.items()}  # type: ignore[arg-type]
        self.run.log({**metrics, **panels}, step=step)
        for message in messages:
            self.run.alert(title=message.name, text=message.text, step=step)

    def finish(self, ok: bool) -> None:
        self.trackio.finish()
