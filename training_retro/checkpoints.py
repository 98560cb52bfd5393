"""Checkpoints: which one to resume from, and where each process continues in its stream."""

import json
import os
from collections.abc import Sequence
from pathlib import Path


def checkpoint_to_resume(asked: str | bool | None, output_dir: str | os.PathLike) -> str | None:
    """Return the checkpoint folder that `resume_from_checkpoint` means, or None to start anew.

    Args:
        asked: a folder; True or "true" for the last whole checkpoint in output_dir; None, False or
            "false" for none.
        output_dir: the folder of the run.

    Raises:
        ValueError: there is no checkpoint, or it is not complete.
    """
    word = str(asked).lower()
    if asked is None or word == "false":
        return None
    folder = last_whole_checkpoint(output_dir) if word == "true" else str(asked)
    if folder is None:
        raise ValueError(
            f"resume_from_checkpoint is true, but there is no checkpoint in {str(output_dir)!r} (output_dir)."
        )
    if not _is_whole(Path(folder)):
        raise ValueError(
            f"resume_from_checkpoint: {folder!r} is no whole checkpoint of a training run. Its trainer_state.json is "
            "missing or cut off."
        )
    return folder


def last_whole_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """Return the latest checkpoint with its trainer_state.json, which is written last."""
    numbered = ((path.name.removeprefix("checkpoint-"), path) for path in Path(output_dir).glob("checkpoint-*"))
    folders = {int(number): path for number, path in numbered if number.isdecimal()}
    latest_first = (folders[step] for step in sorted(folders, reverse=True))
    return next((str(folder) for folder in latest_first if _is_whole(folder)), None)


def _is_whole(checkpoint: Path) -> bool:
    """Return True if a checkpoint's trainer_state.json is there and complete."""
    try:
        return isinstance(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):  # missing, or cut off
        return False


def save_place(checkpoint: str | os.PathLike, place: Sequence[int], process: int, processes: int) -> None:
    """Write where one process continues in its stream."""
    _place_file(checkpoint, process).write_text(json.dumps({"place": list(place), "processes": processes}))


def load_place(checkpoint: str | os.PathLike, process: int, processes: int) -> list[int]:
    """Return where one process continues in its stream.

    Raises:
        ValueError: the checkpoint does not say, or was made by another number of processes.
    """
    file = _place_file(checkpoint, process)
    if not file.is_file():
        raise ValueError(
            f"{checkpoint} does not say where process {process} continues in the stream. It was made with other data, "
            "or by fewer processes."
        )
    saved = json.loads(file.read_text())
    if saved["processes"] != processes:
        raise ValueError(
            f"{checkpoint} was made by {saved['processes']} processes that shared the stream, this run has "
            f"{processes}. Resume with as many."
        )
    return saved["place"]


def _place_file(checkpoint: str | os.PathLike, process: int) -> Path:
    return Path(checkpoint) / f"data_place_{process}.json"
