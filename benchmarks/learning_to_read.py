"""Measure what minutes of RETROfitting gain over a decoder and over copying, on three corpora.

    python benchmarks/learning_to_read.py runs/reading    # two hours on 2 cores; can be resumed

Each corpus has 22,000 chunks; the third needs Debian's linux-doc-6.1. A decoder of 6 layers and
width 256 is trained alone and frozen. RETRO is then fitted onto it, once for each seed.

Printed are bits per byte on held-out documents for the decoder, the decoder with the copy baseline,
and RETRO with its own neighbors and with shuffled ones. They are measured over all positions in
reach of neighbors ("all"), and without chunks that share a run of more than 8 tokens with their
neighbors ("no leaks"): an eighth of a chunk, the strictest filter of the paper's section 2.6.
Intervals are two standard errors over sequences. "Harm" is the loss with shuffled neighbors,
relative to the decoder's.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import corpora
import torch
from datasets import load_from_disk
from machine import MINILM, build_knowledge_base, machine
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from data_retro.collator import RetroDataCollator
from evaluation_retro import Evaluation, best_weight, byte_lengths, sequence_nats, weight_nats
from modeling_retro import RetroForCausalLM
from retrieval.retriever import runs

ROOT = Path(__file__).parents[1]
CHUNKS, CHUNK, BLOCK, BATCH = 22_000, 64, 512, 4
LEAK = 8  # tokens that a chunk may share with its neighbors in a row
DECODER_STEPS = 480
CORPORA = ["models", "python", "kernel"]
HELD_OUT = 160  # sequences to measure
WEIGHT_SEQUENCES = 64  # training sequences that choose the weight of the copy baseline
EVALUATION_BATCH = 8
READ_SHARE = 0.45  # share of the training documents that RETRO is fitted on
MODEL = (
    "{n_layer: 6, n_embd: 256, n_head: 8, n_positions: 512, cca_layers: [2, 5], "
    "embd_pdrop: 0.0, attn_pdrop: 0.0, resid_pdrop: 0.0}"
)
COMMON = {
    "block_size": BLOCK,
    "warmup_steps": 30,
    "per_device_train_batch_size": BATCH,
    "logging_steps": 20,
    "save_strategy": "no",
    "disable_tqdm": "true",
    "use_cpu": "true",
}


def train(*config: Path, **settings: object) -> float:
    """Run train_hf.py, with a configuration file or without, and return its seconds.

    Raises:
        RuntimeError: the run failed.
    """
    flags = [text for key, value in (COMMON | settings).items() for text in (f"--{key}", str(value))]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_hf.py"), *map(str, config), *flags], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return time.perf_counter() - started


def prepare(folder: Path, documents: Iterator) -> None:
    """Make texts, tokenizer, knowledge base, decoder and precomputed neighbors, if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    new = {"tokenizer_name": folder / "tokenizer", "config_overrides": MODEL}
    if not (folder / "kb.db").exists():
        build_knowledge_base(folder, corpora.write(documents, folder, CHUNKS, CHUNK))
    if not (folder / "decoder").exists():
        text = {"train_data": folder / "train", "output_dir": folder / "decoder"}
        train(**new, **text, max_steps=DECODER_STEPS, learning_rate=1e-3)
    if not (folder / "neighbors").exists():
        some = int(READ_SHARE * len(list((folder / "train").iterdir())))
        place = {"knowledge_base": folder / "kb.db", "collection_name": "text", "embedding_model": MINILM}
        train_data = [{"dataset": str(folder / "train"), "take": some}]
        data = {"train_data": train_data, "validation_data": [str(folder / "held_out")]}
        (folder / "read.yaml").write_text(json.dumps(data))
        flags = [text for key, value in (new | place).items() for text in (f"--{key}", str(value))]
        flags += ["--block_size", str(BLOCK), "--output_dir", str(folder), "--precompute_to", str(folder / "neighbors")]
        subprocess.run([sys.executable, str(ROOT / "train_hf.py"), str(folder / "read.yaml"), *flags], check=True)


def retrofit(folder: Path, name: str, steps: int, **settings: object) -> Path:
    """Fit RETRO onto the decoder, unless that was done before, and return its folder."""
    output = folder / name
    if not (output / "model.safetensors").exists():
        onto = {
            "model_name_or_path": folder / "decoder",
            "precomputed": folder / "neighbors",
            "freeze_backbone": "true",
        }
        seconds = train(**onto, output_dir=output, max_steps=steps, **settings)
        (output / "seconds.txt").write_text(f"{seconds:.0f}")
    return output


def without_leaks(sequence: dict) -> dict:
    """Set the labels of chunks that share a long run with their neighbors to -100."""
    tokens, labels = sequence["input_ids"], list(sequence["input_ids"])
    for chunk in range(1, len(tokens) // CHUNK + 1):
        neighbors, masks = (sequence[name][chunk - 1] for name in ("neighbor_ids", "neighbor_attention_mask"))
        text = runs(tokens[chunk * CHUNK : (chunk + 1) * CHUNK], LEAK + 1)
        for ids, mask in zip(neighbors, masks, strict=True):
            if not text.isdisjoint(runs([token for token, there in zip(ids, mask, strict=True) if there], LEAK + 1)):
                labels[chunk * CHUNK : (chunk + 1) * CHUNK] = [-100] * len(tokens[chunk * CHUNK : (chunk + 1) * CHUNK])
    return sequence | {"labels": labels}


def measure(model_folder: Path, folder: Path) -> dict[str, Evaluation]:
    """Evaluate a model on held-out sequences: on all chunks, and on those without leaks."""
    model = RetroForCausalLM.from_pretrained(model_folder).eval()
    token_bytes = byte_lengths(AutoTokenizer.from_pretrained(folder / "tokenizer"))
    stored, collate = load_from_disk(str(folder / "neighbors")), RetroDataCollator()
    training = stored["train"].shuffle(seed=0).select(range(WEIGHT_SEQUENCES))
    some = DataLoader(training, EVALUATION_BATCH, collate_fn=collate)
    weight = best_weight(weight_nats(model, some, CHUNK, model.device))
    measured: dict[str, list] = {"all": [], "no leaks": []}
    held_out = stored["validation"].shuffle(seed=0).select(range(HELD_OUT))
    for rows in DataLoader(held_out, EVALUATION_BATCH, collate_fn=list):
        batch = collate(rows)
        measured["all"].append(sequence_nats(model, batch, CHUNK, token_bytes, weight))
        for row, sequence in enumerate(rows):
            labels = torch.tensor(without_leaks(sequence)["labels"])
            batch["labels"][row, : len(labels)] = labels
        measured["no leaks"].append(sequence_nats(model, batch, CHUNK, token_bytes, weight))
    return {
        name: Evaluation(*(torch.cat(tensors).numpy() for tensors in zip(*parts, strict=True)))
        for name, parts in measured.items()
    }


def report(name: str, evaluation: Evaluation) -> str:
    """Return a line of bits per byte in reach of neighbors and the gain over the copy baseline."""
    bits = [evaluation.bits_per_byte(condition, True) for condition in ("off", "copy_baseline", "on", "shuffled")]
    gain, error = evaluation.gain("copy_baseline")
    harm = evaluation.loss("shuffled", True) / evaluation.loss("off", True) - 1
    return (
        f"{name:36s}" + "".join(f"{bit:9.4f}" for bit in bits) + f"  {gain:+.4f} ± {2 * error:.4f}  {100 * harm:+.2f} %"
    )


def main() -> None:
    """Print two lines for each corpus and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps texts, knowledge bases and models")
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=CORPORA)
    parser.add_argument("--seeds", type=int, default=3, help="RETROfits of each corpus")
    parser.add_argument("--steps", type=int, default=120, help="steps of a RETROfit, 2,048 tokens each")
    parser.add_argument("--kernel_docs", type=Path, default=corpora.KERNEL_DOCS, help="default: %(default)s")
    parser.add_argument("--copy_head_alone", action="store_true", help="leave cross-attention out")
    arguments = parser.parse_args()
    print(machine(), flush=True)
    print(f"{'in reach of neighbors, bits per byte':36s}  decoder   + copy  RETRO on shuffled  gain over + copy   harm")
    overrides: dict[str, object] = {"cca_layers": []} if arguments.copy_head_alone else {"cca_match": True}
    overrides |= {"copy_head": True}
    sources = {"models": corpora.models(), "python": corpora.python(), "kernel": corpora.kernel(arguments.kernel_docs)}
    for name in arguments.corpora:
        folder = arguments.folder / name
        prepare(folder, sources[name])
        for seed in range(arguments.seeds):
            settings = {"learning_rate": 2e-3, "config_overrides": json.dumps(overrides), "seed": seed}
            label = f"{'copy' if arguments.copy_head_alone else 'retro'}{arguments.steps}_{seed}"
            fitted = retrofit(folder, label, arguments.steps, **settings)
            print(f"{name}, {label}: fitted in {(fitted / 'seconds.txt').read_text()} s")
            for positions, evaluation in measure(fitted, folder).items():
                print(report(f"{name}, {label}, {positions}", evaluation), flush=True)


if __name__ == "__main__":
    main()
