"""Measure what retrieval costs a training step: precomputed, in the step, and fetched ahead.

    python benchmarks/prefetch.py

The retriever sleeps for a set share of a training step instead of searching. Like a server or an
embedding model on its own device, it leaves the processor free, so only the overlap is measured.
`RetroTrainer` trains on the CPU. The ways take turns; median, least and most over the rounds are
printed.
"""

import argparse
import statistics
import tempfile
import time
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from machine import machine, source_files, source_tokenizer, spread
from transformers import PreTrainedTokenizerBase, TrainerCallback

from configuration_retro import RetroConfig
from data_retro.collator import RetroDataCollator
from modeling_retro import RetroForCausalLM
from training_retro import RetroTrainer, RetroTrainingArguments

CHUNK, LENGTH, VOCABULARY = 64, 512, 8192
STEPS, BATCH = 12, 4
PREFETCHED = 4  # batches


class SleepingRetriever:
    """A retriever that makes neighbors up, after a pause of `seconds`."""

    chunk_size, num_neighbors, neighbor_length, vocab_size = CHUNK, 2, 2 * CHUNK, VOCABULARY
    embedding_model = "none"
    seconds = 0.0

    def retrieve(self, chunks: torch.Tensor, exclude_doc_ids: Any = None) -> SimpleNamespace:
        """Return shifted copies of the chunks as their neighbors."""
        time.sleep(self.seconds)
        ids = (chunks[:, None].repeat(1, 2, 2) + 1) % self.vocab_size
        mask = torch.ones_like(ids, dtype=torch.bool)
        return SimpleNamespace(ids=ids, attention_mask=mask, scores=torch.ones(len(ids), 2))


class StepClock(TrainerCallback):
    """Notes the time at the end of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


def seconds_per_step(
    model: RetroForCausalLM,
    rows: Dataset,
    retriever: Any,
    tokenizer: PreTrainedTokenizerBase,
    prefetch: int,
) -> float:
    """Train for `STEPS` steps and return the mean time of a step, without the first two."""
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = RetroTrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            save_strategy="no",
            logging_steps=STEPS,
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = RetroTrainer(
            model=model,
            args=arguments,
            data_collator=RetroDataCollator(retriever),
            train_dataset=rows,
            processing_class=tokenizer,
            prefetch_batches=prefetch,
        )
        trainer.add_callback(clock)
        trainer.train()
    return (clock.ends[-1] - clock.ends[1]) / (len(clock.ends) - 2)


def main() -> None:
    """Print the time and speed of each way, for each latency."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    parser.add_argument(
        "--latencies",
        type=float,
        nargs="+",
        default=[0.8, 2.0],
        help="pauses of the retriever, as shares of a training step",
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = RetroConfig(vocab_size=VOCABULARY, n_layer=6, n_embd=256, n_head=8, n_positions=LENGTH, cca_layers=[2, 5])
    model, tokenizer = RetroForCausalLM(config), source_tokenizer(source_files())
    retriever: Any = SleepingRetriever()
    tokens = torch.randint(1, VOCABULARY, (STEPS * BATCH, LENGTH)).tolist()
    rows = Dataset.from_list([{"input_ids": row, "doc_ids": [["d"]] * (LENGTH // CHUNK)} for row in tokens])
    collator = RetroDataCollator(retriever)
    stored = Dataset.from_list(
        [row | {n: v.tolist() for n, v in collator.neighbors_of([row])[0].items()} for row in rows]
    )
    print(
        f"{machine()}, {torch.get_num_threads()} torch threads; 6 layers of width 256, {BATCH} rows of {LENGTH} tokens"
    )
    ways = {
        "precomputed": lambda: seconds_per_step(model, stored, None, tokenizer, 0),
        "fetched in the step": lambda: seconds_per_step(model, rows, retriever, tokenizer, 0),
        "fetched ahead": lambda: seconds_per_step(model, rows, retriever, tokenizer, PREFETCHED),
    }
    alone = statistics.median(ways["precomputed"]() for _ in range(2))
    print(f"a step with precomputed neighbors takes about {alone:.3f} s")
    for latency in arguments.latencies:
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, run in ways.items():
                taken[name].append(run())
                if name == "precomputed":
                    retriever.seconds = latency * taken[name][-1]  # relative to this round's step
        print(f"\nretriever's latency: {latency} of a step")
        for name, values in taken.items():
            times = [value / base for value, base in zip(values, taken["precomputed"], strict=True)]
            speeds = [BATCH * LENGTH / value for value in values]
            print(f"  {name:20s} {spread(times, digits=3)} steps; {spread(speeds, digits=0)} tokens/s")


if __name__ == "__main__":
    main()
