"""Draw the way of the data through RETRO, for docs/concepts.md.

    python docs/pictures/draw_concepts.py docs/pictures/concepts.svg

It needs matplotlib, which the extra `demo` installs.
"""

import sys

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

WIDTH, HEIGHT = 2.35, 0.95  # of a box
COLUMNS = (1.35, 4.25, 7.15, 10.05, 12.95)
ROWS = (5.0, 2.9, 0.8)
BUILD, SEARCH, MODEL, MILVUS = "#dbe9f6", "#e3f1dc", "#fbe6d2", "#d9d2ea"

Place = tuple[int, int]  # column, row

BOXES: dict[Place, tuple[str, str, str]] = {
    (0, 0): ("Text", "files, folders, datasets", BUILD),
    (1, 0): ("Chunks", "64 tokens, and the 64\nthat follow them", BUILD),
    (2, 0): ("Vectors", "by a sentence-transformers\nmodel", BUILD),
    (3, 0): ("Milvus", "a file, a server\nor a cluster", MILVUS),
    (0, 1): ("Query", "the chunk that has\njust been completed", SEARCH),
    (1, 1): ("Vector", "by the same\nembedding model", SEARCH),
    (2, 1): ("Neighbor encoder", "reads each neighbor\nin both directions", MODEL),
    (3, 1): ("Neighbors", "k passages of\nup to 128 tokens", SEARCH),
    (0, 2): ("Tokens", "the text so far", MODEL),
    (1, 2): ("Decoder", "self-attention\nand MLP", MODEL),
    (2, 2): ("Cross-attention", "in some layers of\nthe decoder", MODEL),
    (3, 2): ("Copy head", "optional", MODEL),
    (4, 2): ("Logits", "of the next token", MODEL),
}
ROW_TITLES = (
    "Once: build the knowledge base",
    "For every chunk: search it",
    "For every token: predict",
)


def draw_box(axes: Axes, place: Place, title: str, text: str, color: str) -> None:
    """Draw one step as a box with a bold title and its explanation."""
    x, y = COLUMNS[place[0]], ROWS[place[1]]
    corner = (x - WIDTH / 2, y - HEIGHT / 2)
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle=style, facecolor=color, edgecolor="#555"))
    axes.text(x, y + 0.24, title, ha="center", va="center", fontsize=11, fontweight="bold")
    axes.text(x, y - 0.17, text, ha="center", va="center", fontsize=8.5, linespacing=1.25)


def draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "", **style: str) -> None:
    """Draw an arrow between two points, with a label beside its middle."""
    axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": "#333", "shrinkA": 0, "shrinkB": 0, **style}
    )
    if text:
        middle = ((start[0] + end[0]) / 2 + 0.1, (start[1] + end[1]) / 2)
        axes.text(*middle, text, ha="left", va="center", fontsize=8.5, style="italic", color="#333")


def side(place: Place, dx: float = 0, dy: float = 0) -> tuple[float, float]:
    """Return a point on a box's edge: dx and dy from -1 to 1, (0, 0) is its center."""
    return COLUMNS[place[0]] + dx * WIDTH / 2, ROWS[place[1]] + dy * HEIGHT / 2


def main(drawing: str) -> None:
    """Draw the picture into this SVG file."""
    figure, axes = plt.subplots(figsize=(11.6, 5.3), layout="tight")
    for place, (title, text, color) in BOXES.items():
        draw_box(axes, place, title, text, color)
    for row, title in enumerate(ROW_TITLES):
        axes.text(COLUMNS[0] - WIDTH / 2, ROWS[row] + 0.68, title, fontsize=9.5, color="#666")
    for row, columns in ((0, (0, 1, 2)), (1, (0,)), (2, (0, 1, 2, 3))):
        for column in columns:
            draw_arrow(axes, side((column, row), 1), side((column + 1, row), -1))
    draw_arrow(axes, side((0, 2), 0.8, 1), side((0, 1), 0.8, -1))
    draw_arrow(axes, side((1, 1), 0.8, 1), side((3, 0), -0.8, -1))
    axes.text(7.3, 4.12, "search by similarity", ha="right", fontsize=8.5, style="italic", color="#333")
    draw_arrow(axes, side((3, 0), 0, -1), side((3, 1), 0, 1), "the k nearest")
    draw_arrow(axes, side((3, 1), -1), side((2, 1), 1))
    draw_arrow(axes, side((2, 1), 0, -1), side((2, 2), 0, 1), "encoded neighbors")
    draw_arrow(axes, side((3, 1), 0, -1), side((3, 2), 0, 1), "their tokens")
    draw_arrow(axes, side((1, 2), 0.5, 1), side((2, 1), -1, -0.4), linestyle="dashed")
    axes.text(5.15, 1.9, "the chunk's hidden states", ha="right", fontsize=8.5, style="italic", color="#333")
    axes.set_xlim(0, COLUMNS[-1] + WIDTH / 2 + 0.1)
    axes.set_ylim(0.2, 5.95)
    axes.set_axis_off()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "concepts"}):  # text stays text
        figure.savefig(drawing, facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
