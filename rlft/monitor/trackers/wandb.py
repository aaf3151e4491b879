"""Weights & Biases, online or offline, one row per line of metrics.jsonl.

`train/global_step` is the x-axis of every chart. A resumed run goes on under the same id, kept in wandb/rlft.json.
Steps past the checkpoint are then logged again, and their charts show both: W&B drops rows whose own `_step` is not
above the last, so rows are numbered on from all that were ever logged (W&B's rewinding would cut them off, but is a
preview, online only, and cannot be used with a step metric). Offline each start writes a file of its own, marked as
resuming the same id, which `wandb sync RUN/wandb/offline-*` sends in order.

The completions of each step are a table of their own under one key: the panel shows the newest and the query
`runs.history.concat["completions"]` all of them. (An incremental table would show its last 100 parts only.)
"""

from __future__ import annotations

import json
import secrets
from typing import Any

from rlft.monitor.trackers import Start

PACKAGE, SINCE = "wandb", "0.31"


def problem(track: Any) -> str:
    """Why an online run could not start, "" when it could. wandb itself would wait for someone to type a key."""
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
    """One run."""

    def __init__(self, start: Start) -> None:
        import wandb

        self.wandb, track = wandb, start.track
        record = start.folder / "wandb" / "rlft.json"
        known = start.resumed and record.exists()
        id = json.loads(record.read_text())["id"] if known else secrets.token_hex(4)
        record.parent.mkdir(exist_ok=True)
        record.write_text(json.dumps({"id": id}) + "\n")
        self.run = wandb.init(
            project=track.project,
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
            # "off": it would put a wrapper around stdout, which is not ours to patch. Five minutes: never hang at the
            # end; what was not sent by then stays in the folder for `wandb sync`.
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
            data = [list(r.values()) for r in rows]
            row[name] = self.wandb.Table(columns=list(rows[0]), data=data, allow_mixed_types=True)
        for message in messages:
            self.health.append([step, message.name, message.text])
            self.run.alert(title=message.name, text=f"step {step}: {message.text}", level="WARN")
        if messages:
            row["health"] = self.wandb.Table(columns=["step", "name", "text"], data=self.health)
        # With a step of ours, wandb would hold the row back until the next one; a kill must not lose it.
        self.run.log(row, step=self.row, commit=True)
        self.row += 1

    def finish(self, ok: bool) -> None:
        self.run.finish(exit_code=0 if ok else 1)
