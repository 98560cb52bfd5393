"""Measure tokens per second of `train_hf.py` on real text, for each way to get the neighbors.

    python benchmarks/training.py

The neighbors are precomputed, fetched in the step or fetched ahead, in one process and in two.
Evaluation is measured, too. The text is Python's sources and those of installed packages, in a
Milvus Lite file with MiniLM embeddings. The decoder has 6 layers of width 256 and reads batches of
8 sequences of 512 tokens. Each way is a run of its own. The ways take turns; median, least and most
over the rounds are printed.

Without a GPU, embedding and training share the processor, so fetching ahead is not free.
prefetch.py measures the overlap alone.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import MINILM, build_knowledge_base, machine, read_files, source_files, source_tokenizer, spread

ROOT = Path(__file__).parents[1]
LAUNCH = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
EVALUATION = "evaluation"  # all conditions, with retrieval
LENGTH = 512  # tokens in a sequence
SIZES = "{n_layer: 6, n_embd: 256, n_head: 8, n_positions: 512, cca_layers: [2, 5]}"


def prepare(folder: Path, characters: int) -> None:
    """Write texts and tokenizer, and build the knowledge base."""
    total = 0
    for number, document in enumerate(read_files(source_files())):
        part = "held_out" if number % 10 == 0 else "train"
        (folder / part).mkdir(exist_ok=True)
        (folder / part / f"{number}.txt").write_text(document.text, encoding="utf-8")
        total += len(document.text)
        if total >= characters:
            break
    tokenizer = source_tokenizer(source_files())
    tokenizer.save_pretrained(folder / "tokenizer")
    build_knowledge_base(folder, tokenizer)


def run(
    folder: Path, command: Sequence[str], name: str, steps: int, batch: int, **settings: object
) -> dict[str, float]:
    """Run train_hf.py and return the last log, together with the evaluation's if there is one."""
    output = folder / name
    settings = {
        "tokenizer_name": folder / "tokenizer",
        "config_overrides": SIZES,
        "train_data": folder / "train",
        "output_dir": output,
        "max_steps": steps,
        "logging_steps": steps // 2,  # the first half warms up
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 8,
        "neighbor_cache_size": 0,
        "save_strategy": "no",
        "use_cpu": "true",
        "disable_tqdm": "true",
    } | settings
    flags = [text for key, value in settings.items() if value is not None for text in (f"--{key}", str(value))]
    done = subprocess.run([*command, str(ROOT / "train_hf.py"), *flags], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    if not (output / "trainer_state.json").exists():
        return {}
    logs = json.loads((output / "trainer_state.json").read_text())["log_history"]
    result = [log for log in logs if "tokens_per_second" in log][-1]
    evaluated = output / "eval_results.json"
    return result | (json.loads(evaluated.read_text()) if evaluated.exists() else {})


def main() -> None:
    """Print the tokens per second of each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds in which the ways take turns")
    parser.add_argument("--steps", type=int, default=8, help="steps of a run, of which the first half is the warm-up")
    parser.add_argument("--characters", type=int, default=1_000_000, help="size of the text")
    arguments = parser.parse_args()
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, arguments.characters)
        place = {"knowledge_base": folder / "kb.db", "collection_name": "text", "embedding_model": MINILM}
        run(folder, [sys.executable], "none", 2, 8, precompute_to=folder / "stored", **place)
        stored = {"train_data": None, "precomputed": folder / "stored"}
        one = [sys.executable]
        ways: dict[str, tuple[list[str], int, dict[str, Any]]] = {  # command, batch size, settings
            "the decoder alone": (one, 8, {}),
            "neighbors precomputed": (one, 8, stored),
            "fetched in the step": (one, 8, {"prefetch_batches": 0, **place}),
            "fetched ahead": (one, 8, {"prefetch_batches": 4, **place}),
            "precomputed, two processes": (LAUNCH, 4, stored),
            "fetched ahead, two processes": (LAUNCH, 4, {"prefetch_batches": 4, **place}),
        }
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        held_out = {"validation_data": folder / "held_out", **place}
        rates = []
        for number in range(1, arguments.rounds + 1):
            for way, (command, batch, settings) in ways.items():
                speeds[way].append(run(folder, command, "run", arguments.steps, batch, **settings)["tokens_per_second"])
                print(f"round {number}: {way:30s} {speeds[way][-1]:.0f} tokens/s", flush=True)
            rates.append(LENGTH * run(folder, one, "eval", 2, 8, **held_out)["eval_samples_per_second"])
            print(f"round {number}: {EVALUATION:30s} {rates[-1]:.0f} tokens/s", flush=True)
        for way, values in (speeds | {EVALUATION: rates}).items():
            print(f"{way:30s} {spread(values, digits=0)} tokens/s")


if __name__ == "__main__":
    main()
