"""Weights & Biases, online or offline, one row per line of metrics.jsonl.

`train/global_step` is the x-axis of every chart. A resumed run continues under the same id, stored in wandb/rlft.json.
Steps past the checkpoint are then logged again, and the charts show both. W&B drops rows whose `_step` is not above the
last one, so row numbers continue after all rows ever logged. (W&B's rewind would remove the old rows, but it is a
preview, online only, and does not work with a step metric.) Offline, each start writes a separate file that resumes the
same id; `wandb sync RUN/wandb/offline-*` uploads them in order.

The completions of each step are a separate table under one key: the panel shows the newest, and the query
`runs.history.concat["completions"]` all of them. (An incremental table would show only its last 100 parts.)
"""

from __future__ import annotations

import json
import os
import secrets
from typing import Any

from rlft.monitor.trackers import Start

PACKAGE, SINCE = "wandb", "0.31"


def problem(track: Any) -> str:
    """Return why an online run cannot start, or "". wandb itself would wait for a key to be typed."""
    import wandb

    mode = wandb.setup().settings.mode
    if track.mode == "online" and mode in ("offline", "dryrun", "disabled"):
        return (
            'track.mode = "online": WANDB_MODE or `wandb offline` say the opposite; unset it (`wandb online`), or set '
            'track.mode = "auto" to follow it'
        )
    if track.mode == "offline" or mode in ("offline", "dryrun", "disabled"):
        return ""
    if wandb.login(prompt=False, verify=False):
        return ""
    return (
        f'track.use = ["wandb"]: not logged in to {wandb.setup().settings.base_url}; run `wandb login` or set '
        f'WANDB_API_KEY, or set track.mode = "offline" and send the run later with `wandb sync`'
    )


class Tracker:
    """The W&B tracker of one run."""

    def __init__(self, start: Start) -> None:
        import wandb

        self.wandb, track = wandb, start.track
        self.project = track.project or os.environ.get("WANDB_PROJECT") or "rlft"
        record = start.folder / "wandb" / "rlft.json"
        has_id = start.resumed and record.exists()
        id = json.loads(record.read_text())["id"] if has_id else secrets.token_hex(4)
        record.parent.mkdir(exist_ok=True)
        record.write_text(json.dumps({"id": id}) + "\n")
        self.run = wandb.init(
            project=self.project,
            entity=track.entity,
            name=start.name,
            group=track.group,
            tags=track.tags or None,
            id=id,
            resume="allow",
            dir=start.folder,
            config=start.config,
            mode=None if track.mode == "auto" else track.mode,
            reinit="create_new",
            # console: "off", since wandb would wrap stdout. finish_timeout: five minutes, so that the end never hangs;
            # unsent data stays in the folder for `wandb sync`.
            settings=wandb.Settings(console="off", finish_timeout=300),
        )
        self.link = self.run.url
        self.run.define_metric("train/global_step")
        self.run.define_metric("*", step_metric="train/global_step")
        self.row = max(start.lines, self.run.step)
        self.health: list[list[Any]] = []

    def log(self, step: int, metrics: dict[str, float], tables: dict[str, list[dict]], messages: Any) -> None:
        row: dict[str, Any] = {"train/global_step": step, **metrics}
        for name, rows in tables.items():
            data = [list(entry.values()) for entry in rows]
            row[name] = self.wandb.Table(columns=list(rows[0]), data=data, allow_mixed_types=True)
        for message in messages:
            self.health.append([step, message.name, message.text])
            self.run.alert(title=message.name, text=f"step {step}: {message.text}", level="WARN")
        if messages:
            row["health"] = self.wandb.Table(columns=["step", "name", "text"], data=self.health)
        # Without commit=True, wandb would hold the row back until the next step, and a kill would lose it.
        self.run.log(row, step=self.row, commit=True)
        self.row += 1

    def finish(self, ok: bool) -> None:
        self.run.finish(exit_code=0 if ok else 1)
