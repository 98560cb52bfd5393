"""Folders that tests download or install: made once for all runs, by one process, and never taken half-made."""

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return the folder, filled by `make(folder)` if it is not there yet.

    Processes that ask for it meanwhile wait. A folder whose making was interrupted is made anew.
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
