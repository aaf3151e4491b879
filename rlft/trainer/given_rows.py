"""Rows that are given from Python as `data`: read those of an iterable, and copy all into the run folder."""

from __future__ import annotations

import itertools
from dataclasses import replace

from rlft.config.data import Data
from rlft.config.run import Config
from rlft.data import given
from rlft.errors import ConfigError
from rlft.runs.folder import Run


def read_streams(cfg: Config) -> tuple[Config, list[str]]:
    """Read the rows of iterables of unknown length, as many as the run can draw.

    Returns the config with these rows in place of the iterables, and notes about them. Raises ConfigError when the run
    has no number of steps, DataError when an iterable raises.
    """
    notes = []
    if given.is_stream(cfg.data.rows):
        if cfg.steps is None:
            raise ConfigError("data.epochs: the rows are an iterable, whose length is not known; set steps instead")
        held = cfg.eval.rows if cfg.eval.data is None else 0
        most = cfg.steps * cfg.prompts_per_step * (1 + cfg.dynamic_sampling.rounds) + held
        cfg = replace(cfg, data=_first(cfg.data, most))
        notes.append(
            f"data: the first {len(cfg.data.rows)} rows of the iterable are used, in its order (data.shuffle = false); "
            f"the run can draw {most}"
        )
    if cfg.eval.data is not None and given.is_stream(cfg.eval.data.rows):
        cfg = replace(cfg, eval=replace(cfg.eval, data=_first(cfg.eval.data, cfg.eval.rows)))
    return cfg, notes


def _first(data: Data, count: int) -> Data:
    rows = given.packed(itertools.islice(data.rows, count))
    return replace(data, rows=rows, shuffle=False)


def as_written(cfg: Config) -> Config:
    """Return the config with a file in the place of rows that are given from Python, as config.toml will have it."""
    evals = cfg.eval.data
    if cfg.data.rows is not None:
        cfg = replace(cfg, data=replace(cfg.data, path="data.jsonl", rows=None))
    if evals is not None and evals.rows is not None:
        cfg = replace(cfg, eval=replace(cfg.eval, data=replace(evals, path="eval-data.jsonl", rows=None)))
    return cfg


def copy_rows(cfg: Config, run: Run) -> Config:
    """Copy rows that were given from Python into the run folder, and return the config that names the copies."""
    data, evals = cfg.data, cfg.eval.data
    with run.writing("the rows given as data"):
        if data.rows is not None:
            cfg = replace(cfg, data=given.copied(data, run.path, "data"))
        if evals is not None and evals.rows is not None:
            cfg = replace(cfg, eval=replace(cfg.eval, data=given.copied(evals, run.path, "eval-data")))
    return cfg
