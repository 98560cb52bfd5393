"""Keep finished parts of a long measurement in a folder, so that it can go on after a break."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

Arrays = dict[str, np.ndarray]
DESCRIPTION = "measured.json"


class Kept:
    """A folder of finished parts.

    Args:
        folder: made if it is missing. It belongs to nothing until a part is kept, so that bad input
            that ends a measurement early leaves the folder free.
        of: what the parts belong to, in values that JSON can hold: the model, the texts, the
            knowledge base, the sizes. A folder of something else is refused.

    Raises:
        ValueError: the folder keeps the parts of another measurement.
    """

    def __init__(self, folder: Path, of: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._description = json.dumps(of, indent=1)
        if not (folder / DESCRIPTION).exists():
            return
        described = json.loads(self._description)
        stored = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        names = stored.keys() | described.keys()
        changed = {name: (stored.get(name), described.get(name)) for name in names}
        changed = {name: values for name, values in changed.items() if values[0] != values[1]}
        if changed:
            listed = "; ".join(f"{name} was {old!r} and is {new!r}" for name, (old, new) in sorted(changed.items()))
            raise ValueError(f"{folder} keeps parts of another measurement: {listed}. Name another folder.")

    def arrays(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        """Return arrays by name, from the folder or computed and then kept.

        Args:
            name: of the part, a file name without its suffix.
            compute: called if the part is not there.
        """
        file = self.folder / f"{name}.npz"
        if not file.exists():
            computed = compute()
            if not (self.folder / DESCRIPTION).exists():
                self.claim()
            _write_whole(file, lambda part: _save(part, computed))
        with np.load(file, allow_pickle=False) as stored:
            return dict(stored)

    def parts(self, name: str, count: int, size: int, compute: Callable[[range], Arrays]) -> Arrays:
        """Return arrays of `count` rows, computed and kept in parts. A bar shows the progress.

        Args:
            name: of the whole. Each part is a file of its own.
            count: rows in all.
            size: rows in a part, which a break loses at most.
            compute: returns the arrays of some rows.
        """
        ranges = [range(start, min(start + size, count)) for start in range(0, count, size)]
        bar = tqdm(ranges, desc=name, leave=False)
        done = [self.arrays(f"{name}_{rows.start}", partial(compute, rows)) for rows in bar]
        return {key: np.concatenate([part[key] for part in done]) for key in done[0]} if done else {}

    def claim(self) -> None:
        """Write what the folder's parts belong to, as the first part does, too."""
        text = self._description
        _write_whole(self.folder / DESCRIPTION, lambda part: part.write_text(text, encoding="utf-8"))


def _save(part: Path, arrays: Arrays) -> None:
    with part.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name first, so that a break leaves none that is half written."""
    part = file.with_name(f"{file.name}.part")
    write(part)
    part.replace(file)
