"""Draw where a trained model looks: each token of a text, how much of its prediction was copied, and from which place.

    python examples/draw_reading.py demo_output/retro demo_output/kb.db text.txt drawing.svg --embedding_model …

The text is read by the model as one row; drawn is one of its chunks, beside the neighbors that it reads.
"""

import argparse
from html import escape
from pathlib import Path

import torch
from transformers import AutoTokenizer

from modeling_retro import RetroForCausalLM
from retrieval import MilvusRetriever

LINE, WIDTH, SIZE = 15, 7.3, 12  # of the type, in SVG's units
COLUMNS, GAP = 64, 190  # characters of a panel, and between panels


def place_tokens(texts: list[str], left: float, top: float) -> tuple[list[tuple[float, float, str]], float]:
    """Each token's place in a panel and what of it fits its line; and where the panel ends."""
    places, column, line = [], 0, 0
    for text in texts:
        text = text.replace("\t", "    ")
        if column + len(text.split("\n")[0]) > COLUMNS:
            column, line = 0, line + 1
        places.append((left + column * WIDTH, top + line * LINE, text.split("\n")[0] or "⏎"))
        breaks = text.count("\n")
        line += min(breaks, 1)
        column = len(text.split("\n")[-1]) if breaks else column + len(text)
    return places, top + (line + 1) * LINE


def draw(text: list[str], gates: list[float], neighbors: list[list[str]], titles: list[str], looks: list) -> str:
    """An SVG: the text on the left, its neighbors on the right, a line from each token that was copied to its source.

    Args:
        looks: for each token (neighbor, place) of where it was mostly copied from.
    """
    right = COLUMNS * WIDTH + GAP
    ours, height = place_tokens(text, 10, 50)
    theirs, top = [], 50.0
    parts = []
    for title, tokens in zip(titles, neighbors, strict=True):
        parts.append(f'<text x="{right}" y="{top - 18:.0f}" font-weight="bold">{escape(title)}</text>')
        places, end = place_tokens(tokens, right, top)
        theirs.append(places)
        top = end + 40
    parts.append('<text x="10" y="32" font-weight="bold">held-out text; the darker, the more was copied</text>')
    for place, (x, y, shown) in enumerate(ours):
        width = max(len(shown), 1) * WIDTH
        parts.append(
            f'<rect x="{x:.1f}" y="{y - 11:.1f}" width="{width:.1f}" height="14" fill="#e8590c" opacity="{gates[place]:.2f}"/>'
        )
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" xml:space="preserve">{escape(shown)}</text>')
        if gates[place] > 0.5 and looks[place] is not None:
            to_x, to_y, to_shown = theirs[looks[place][0]][looks[place][1]]
            from_x = x + width
            parts.append(
                f'<path d="M{from_x:.1f},{y - 4:.1f} C{from_x + 60:.1f},{y - 4:.1f} {to_x - 60:.1f},{to_y - 4:.1f} {to_x:.1f},{to_y - 4:.1f}" '
                'fill="none" stroke="#1971c2" stroke-width="0.7" opacity="0.6"/>'
            )
            parts.append(
                f'<rect x="{to_x:.1f}" y="{to_y - 11:.1f}" width="{max(len(to_shown), 1) * WIDTH:.1f}" height="14" fill="#1971c2" opacity="0.15"/>'
            )
    for places in theirs:
        for x, y, shown in places:
            parts.append(f'<text x="{x:.1f}" y="{y:.1f}" xml:space="preserve">{escape(shown)}</text>')
    size = f'width="{right + COLUMNS * WIDTH + 10:.0f}" height="{max(height, top):.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="monospace" font-size="{SIZE}">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("knowledge_base")
    parser.add_argument("text", type=Path)
    parser.add_argument("drawing", type=Path)
    parser.add_argument("--embedding_model")
    parser.add_argument("--collection_name", default="retro")
    parser.add_argument("--chunk", type=int, help="Default: the one of which most is copied.")
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
    size = model.config.chunk_size
    ids = retriever.tokenizer.encode_batch([arguments.text.read_text(encoding="utf-8")])
    tokens = torch.tensor(ids)[:, : model.config.n_positions]
    chunks = tokens[0, : tokens.shape[1] // size * size].view(-1, size)
    found = retriever.retrieve(chunks)
    retriever.close()
    with torch.no_grad():
        outputs = model.transformer(
            tokens,
            neighbor_ids=found.ids[None],
            neighbor_attention_mask=found.attention_mask[None],
            neighbor_scores=found.scores[None],
        )
        looks = model.copy_head.gate_and_attention(
            model.lm_head(outputs.last_hidden_state), outputs.last_hidden_state, outputs.copy_candidates
        )
    gates, places = looks[0][0], looks[1][0].argmax(-1)
    # position i predicts token i + 1; those of chunk u + 1 read the neighbors of chunk u
    shares = gates[size - 1 :][: (len(chunks) - 1) * size].view(-1, size).mean(-1)
    chunk = int(shares.argmax()) if arguments.chunk is None else arguments.chunk
    predicts = slice((chunk + 1) * size - 1, (chunk + 2) * size - 1)
    length = model.config.neighbor_length
    drawing = draw(
        [tokenizer.decode([token]) for token in tokens[0, (chunk + 1) * size : (chunk + 2) * size].tolist()],
        gates[predicts].tolist(),
        [
            [tokenizer.decode([token]) for token in ids[mask].tolist()]
            for ids, mask in zip(found.ids[chunk], found.attention_mask[chunk], strict=True)
        ],
        [
            f"{name}, chunk {index} (similarity {score:.2f})"
            for name, index, score in zip(
                found.doc_ids[chunk], found.chunk_indices[chunk].tolist(), found.scores[chunk].tolist(), strict=True
            )
        ],
        [(place // length, place % length) for place in places[predicts].tolist()],
    )
    arguments.drawing.write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main()
