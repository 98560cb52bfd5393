"""The report of gpu.py: JSON with every answer, and Markdown tables for people."""

import json
import statistics
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DATASHEET_PEAK = 989e12  # bfloat16 FLOP/s of an H100 SXM and an H200, dense (NVIDIA's data sheets)
Answers = Mapping[tuple[str, tuple], list[dict[str, Any]]]


class Report:
    """Rows by section, written to a folder whenever there are new ones.

    Args:
        folder: created if it is missing.
        command: how the run was started.
    """

    def __init__(self, folder: Path, command: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.log = (folder / "gpu.log").open("w")
        self.sections: dict[str, list[dict[str, Any]]] = {}
        self.about: dict[str, Any] = {"command": command}
        self._started = time.monotonic()

    def add(self, section: str, **row: Any) -> None:
        """Add a row, and print it."""
        self.sections.setdefault(section, []).append(row)
        print(f"[{time.monotonic() - self._started:5.1f} s] {section}: {json.dumps(row)}", flush=True)

    def machine(self, answer: Mapping[str, Any]) -> None:
        """Note the machine and its peak."""
        self.about |= answer
        print(json.dumps(self.about), flush=True)

    def failed(self, name: str, error: Exception) -> None:
        """Note that a phase failed."""
        text = "".join(traceback.format_exception(error))
        print(text, flush=True)
        self.log.write(text)
        self.sections.setdefault("failed", []).append({"phase": name, "error": text[-500:]})

    def decoding(self, answers: Answers) -> None:
        """Replace the rows of decoding by those of the answers so far."""
        rows = []
        for (side, (cache, batch_size)), found in answers.items():
            row = {"side": side, "cache": cache, "batch_size": batch_size}
            good = [answer for answer in found if "error" not in answer]
            if good:
                milliseconds = [answer["ms"] for answer in good]
                row |= {"ms": milliseconds, "gib": max(answer["gib"] for answer in good)}
                row["tokens_per_second"] = 1000 * batch_size / statistics.median(milliseconds)
            rows.append(row | _error(found))
        self._replace("decoding", rows)

    def training(self, answers: Answers, length: int) -> None:
        """Replace the rows of training by those of the answers so far."""
        rows = []
        for (side, (mode, batch_size, _)), found in answers.items():
            row: dict[str, Any] = {"side": side, "mode": mode, "batch_size": batch_size, "length": length}
            good = [answer for answer in found if "error" not in answer]
            if good:
                seconds = [second for answer in good for second in answer["seconds"]]
                median = statistics.median(seconds)
                rate = good[0]["flops"] / median
                row |= {"seconds": seconds, "gib": max(answer["gib"] for answer in good), "loss": good[-1]["loss"]}
                row |= {"tokens_per_second": batch_size * length / median, "flops_of_a_step": good[0]["flops"]}
                row |= {"mfu": rate / self.about.get("peak", float("nan")), "mfu_of_data_sheet": rate / DATASHEET_PEAK}
            rows.append(row | _error(found))
        self._replace("training", rows)

    def _replace(self, section: str, rows: list[dict[str, Any]]) -> None:
        self.sections[section] = []
        for row in rows:
            self.add(section, **row)
        self.write()

    def write(self) -> None:
        """Write gpu.json and gpu.md."""
        text = json.dumps({"about": self.about, **self.sections}, indent=1)
        (self.folder / "gpu.json").write_text(text + "\n", encoding="utf-8")
        (self.folder / "gpu.md").write_text(self.markdown() + "\n", encoding="utf-8")

    def markdown(self) -> str:
        """Return the tables."""
        about = self.about
        peak = about.get("peak", float("nan")) / 1e12
        lines = [f"`{about['command']}`", ""]
        lines += [f"{about.get('device')}, {about.get('cores')} cores, {about.get('versions')}"]
        lines += [f"A large bfloat16 product: {peak:.0f} TFLOP/s", ""]
        for section, columns in TABLES.items():
            if rows := self.sections.get(section):
                lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
                lines += ["| " + " | ".join(_cell(row, column) for column in columns.values()) + " |" for row in rows]
                lines.append("")
        return "\n".join(lines)


def _error(found: list[dict[str, Any]]) -> dict[str, str]:
    """Return the last answer's error, if it is one."""
    return {"error": found[-1]["error"]} if found and "error" in found[-1] else {}


def _cell(row: Mapping[str, Any], column: tuple[str, float, str]) -> str:
    """Return a value's text, or the row's error if there is none."""
    name, scale, form = column
    value = row.get(name)
    if value is None:
        return row.get("error", "").replace("|", "/").replace("\n", " ") if form != "-" else ""
    if isinstance(value, list):
        numbers = [format(scale * number, form) for number in (statistics.median(value), min(value), max(value))]
        return f"{numbers[0]} ({numbers[1]} to {numbers[2]})"
    return format(scale * value, form) if form not in ("", "-") else str(value)


# section -> title of a column -> name of its value, scale, format
TABLES: dict[str, dict[str, tuple[str, float, str]]] = {
    "failed": {"phase": ("phase", 1, "-"), "error": ("error", 1, "-")},
    "checks": {
        "check": ("check", 1, "-"),
        "error": ("relative_error", 1, ".1e"),
        "at most": ("tolerance", 1, "-"),
        "passed": ("passed", 1, "-"),
    },
    "decoding": {
        "side": ("side", 1, "-"),
        "cache": ("cache", 1, "-"),
        "rows": ("batch_size", 1, "-"),
        "ms a token (least to most)": ("ms", 1, ".2f"),
        "tokens/s": ("tokens_per_second", 1, "-.0f"),
        "GiB": ("gib", 1, "-.2f"),
    },
    "profile": {
        "side": ("side", 1, "-"),
        "kernels a token": ("kernels", 1, ".0f"),
        "their ms": ("device_ms", 1, "-.2f"),
        "waits of a token": ("waits", 1, "-"),
    },
    "training": {
        "side": ("side", 1, "-"),
        "mode": ("mode", 1, "-"),
        "rows": ("batch_size", 1, "-"),
        "step s (least to most)": ("seconds", 1, ".4f"),
        "tokens/s": ("tokens_per_second", 1, "-.0f"),
        "GiB": ("gib", 1, "-.1f"),
        "MFU %": ("mfu", 100, "-.1f"),
        "MFU % of the data sheet": ("mfu_of_data_sheet", 100, "-.1f"),
    },
}
