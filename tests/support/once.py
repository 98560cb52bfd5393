"""Folders that tests download or install: one process makes them, once for all runs."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return the folder, filled by `make(folder)` if it does not exist.

    Processes that ask for it meanwhile wait. A folder that was left half made is made again.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        complete = folder / "complete"
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            complete.touch()
    return folder


def cache_folder() -> Path:
    """Return the folder of downloads that all checkouts share."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "transformers-retro"
