"""The folders of a dataset's files, in which the relative paths of its images are looked up."""

from __future__ import annotations

from pathlib import Path

from rlft.config.data import Data
from rlft.config.paths import user_path


def folders_of(data: Data) -> tuple[Path, ...]:
    """Return the folders that hold the files of a dataset, each once; none for rows from Python and from the hub."""
    paths = [user_path(path, "data.path") for path in (data.path, *(source.path for source in data.sources)) if path]
    return tuple(dict.fromkeys(path.parent if path.is_file() else path for path in paths if path.exists()))
