"""Train on real text with neighbors fetched on the fly, and draw the held-out curves.

    pip install '.[demo]'
    python benchmarks/real_run.py runs/real    # 45 minutes on 2 cores; can be resumed

The text is the kernel's documentation (Debian's linux-doc-6.1), some 12 million characters, a tenth
of the documents held out. The tokenizer is a byte-level BPE of 8,192 tokens, the embedding model
MiniLM, the knowledge base a Milvus Lite file. A decoder of 6 layers and width 256 is trained alone.
RETRO continues from it, with a copy head and one layer of cross-attention, all parameters training.

Each evaluation prints held-out bits per byte in reach of neighbors, on a sample of the held-out
documents. The curves are drawn to curves.svg in the folder.
"""

import argparse
import json
import math
import time
from pathlib import Path

import corpora
from learning_to_read import CHUNK, MODEL, train
from machine import MINILM, build_knowledge_base, machine
from matplotlib import rc_context
from matplotlib.figure import Figure
from transformers import AutoTokenizer

CHUNKS = 60_000  # some 12 million characters
DECODER_STEPS, STEPS, EVAL_STEPS = 400, 240, 40
EVALUATED = 24  # held-out documents
CURVES = {  # a condition's prefix in the log: label and color
    "shuffled": ("neighbors shuffled", "tab:orange"),
    "off": ("neighbors off", "tab:gray"),
    "copy_baseline": ("off + copy baseline", "tab:purple"),
    "": ("neighbors on", "tab:blue"),
}


def prepare(folder: Path) -> None:
    """Make text, tokenizer, knowledge base and decoder, unless they exist."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer").exists():
        corpora.write(corpora.kernel(), folder, CHUNKS, CHUNK)
    if not (folder / "decoder" / "model.safetensors").exists():
        report = build_knowledge_base(folder, AutoTokenizer.from_pretrained(folder / "tokenizer"))
        print(f"knowledge base: {report.chunks_written:,} chunks written in {report.seconds:.0f} s", flush=True)
        new = {"tokenizer_name": folder / "tokenizer", "config_overrides": MODEL, "learning_rate": 1e-3}
        text = {"train_data": folder / "train", "output_dir": folder / "decoder"}
        print(f"decoder: {train(**new, **text, max_steps=DECODER_STEPS):.0f} s", flush=True)


def train_retro(folder: Path) -> list[dict[str, float]]:
    """Train RETRO from the decoder, unless that was done before, and return its evaluations."""
    output = folder / "retro"
    if not (output / "eval_results.json").exists():
        held_out = folder / "held_out"
        spread = {"dataset": str(held_out), "num_shards": max(len(list(held_out.iterdir())) // EVALUATED, 1)}
        (folder / "held_out.json").write_text(json.dumps({"validation_data": [spread]}))
        settings = {
            "model_name_or_path": folder / "decoder",
            "config_overrides": "{copy_head: true, cca_layers: [5], encoder_num_layers: 1}",
            "train_data": folder / "train",
            "knowledge_base": folder / "kb.db",
            "collection_name": "text",
            "embedding_model": MINILM,
            "output_dir": output,
            "max_steps": STEPS,
            "learning_rate": 3e-4,
            "retro_learning_rate": 2e-3,
            "neighbor_dropout": 0.1,
            "eval_strategy": "steps",
            "eval_steps": EVAL_STEPS,
            "eval_on_start": "true",
            "per_device_eval_batch_size": 8,
        }
        print(f"RETRO: {train(folder / 'held_out.json', **settings):.0f} s with its evaluations", flush=True)
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "eval_loss" in entry]


def field(name: str) -> str:
    """Return the log's name for a condition's bits per byte in reach of neighbors."""
    return "_".join(filter(None, ("eval", name, "bits_per_byte_in_reach")))


def draw(log: list[dict[str, float]], file: Path) -> None:
    """Draw held-out bits per byte in reach of neighbors over steps."""
    figure = Figure(figsize=(7, 3.5), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for name, (label, color) in CURVES.items():
        values = [entry.get(field(name), math.nan) for entry in log]  # the copy baseline has no weight at first
        axes.plot([entry["step"] for entry in log], values, color=color, label=label)
    axes.set(xlabel="steps of 2,048 tokens", ylabel="held-out bits per byte, in reach")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with rc_context({"svg.fonttype": "none"}):  # keep text as text
        figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Run everything that is not there yet, and print a table of the evaluations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps text, knowledge base and models")
    folder = parser.parse_args().folder
    print(machine(), flush=True)
    started = time.perf_counter()
    prepare(folder)
    characters = sum(len(file.read_text(encoding="utf-8")) for file in (folder / "train").iterdir())
    print(f"a knowledge base of {characters:,} characters", flush=True)
    log = train_retro(folder)
    print(f"{time.perf_counter() - started:.0f} s in all\n")
    print("| step | " + " | ".join(label for label, _ in CURVES.values()) + " |")
    print("|---|" + "---|" * len(CURVES))
    for entry in log:
        values = (entry.get(field(name), math.nan) for name in CURVES)
        print(f"| {entry['step']} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
    draw(log, folder / "curves.svg")


if __name__ == "__main__":
    main()
