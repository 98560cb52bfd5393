"""Write a report: numbers as JSON, tables as Markdown, and plots as SVG."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

NO_MATPLOTLIB = "The plots are missing: they need matplotlib. Install it: pip install 'transformers-retro[evaluation]'."
PLOT_SIZE = (6.4, 4.0)  # inches


class Report:
    """A report that grows part by part, and is written at the end.

    Args:
        folder: made if it is missing.
        name: the files' name: <name>.json, <name>.md and <name>_<plot>.svg.
        title: its first line.
    """

    def __init__(self, folder: Path, name: str, title: str) -> None:
        self.folder, self.name = folder, name
        self._lines = [f"# {title}"]
        self._numbers: dict[str, Any] = {}
        self._shown: list[Text | Table] = []
        folder.mkdir(parents=True, exist_ok=True)

    def text(self, markdown: str) -> None:
        """Add a paragraph."""
        self._lines += ["", markdown]
        self._shown.append(Text(markdown))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
        """Add a table. The first column is aligned left, the others right."""
        if title is not None:
            self._lines += ["", f"**{title}**"]
        rule = ["---", *["---:"] * (len(columns) - 1)]
        escaped = [[str(cell).replace("|", "\\|") for cell in row] for row in (columns, rule, *rows)]
        self._lines += ["", *(f"| {' | '.join(row)} |" for row in escaped)]
        table = Table(title=title)
        for place, column in enumerate(columns):
            table.add_column(column, justify="right" if place else "left")
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self._shown.append(table)

    def numbers(self, numbers: Mapping[str, Any]) -> None:
        """Add numbers to the JSON file. Dataclasses become objects, nan and infinity null."""
        self._numbers |= numbers

    def plot(self, name: str, draw: Callable[[Any], None]) -> None:
        """Add a plot.

        Args:
            name: of its file.
            draw: draws on a `matplotlib.axes.Axes`. It is not called if matplotlib is missing.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            if NO_MATPLOTLIB not in self._lines:
                self.text(NO_MATPLOTLIB)
            return
        figure = Figure(figsize=PLOT_SIZE, layout="constrained")
        draw(figure.subplots())
        file = self.folder / f"{self.name}_{name}.svg"
        figure.savefig(file, metadata={"Date": None})
        self._lines += ["", f"![{name}]({file.name})"]

    def save(self) -> None:
        """Write the files, and print the texts and tables."""
        plain = json.dumps(_plain(self._numbers), indent=1, allow_nan=False)
        (self.folder / f"{self.name}.json").write_text(f"{plain}\n", encoding="utf-8")
        file = self.folder / f"{self.name}.md"
        file.write_text("\n".join([*self._lines, ""]), encoding="utf-8")
        console = Console(highlight=False)
        for part in self._shown:
            console.print(part)
        console.print(f"Written to {file}", soft_wrap=True)


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy
        return _plain(value.tolist())
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
