"""Measure what retrieval costs a training step: fetched in the step, fetched ahead, and read from a precomputed folder.

    python benchmarks/prefetch.py

The retriever is made of arithmetic and sleeps for a set share of a training step, as a device of its own or a server would
leave the processor free, so that what is measured is the overlap alone. Steps are those of `RetroTrainer`, on the processor.
Printed are median, least and most over rounds, in which the ways take turns.
"""

import argparse
import statistics
import tempfile
import time
from types import SimpleNamespace

import torch
from datasets import Dataset
from machine import machine, source_files, source_tokenizer, spread

from configuration_retro import RetroConfig
from data_retro.collator import RetroDataCollator
from modeling_retro import RetroForCausalLM
from training_retro import RetroTrainer, RetroTrainingArguments

CHUNK = 64
STEPS = 12
BATCH = 4


class SleepingRetriever:
    """Neighbors at once, but for a pause."""

    chunk_size, num_neighbors, neighbor_length, vocab_size = CHUNK, 2, 2 * CHUNK, 8192
    embedding_model = "none"
    seconds = 0.0

    def retrieve(self, chunks, exclude_doc_ids=None):
        time.sleep(self.seconds)
        ids = (chunks[:, None].repeat(1, 2, 2) + 1) % self.vocab_size
        mask = torch.ones_like(ids, dtype=torch.bool)
        return SimpleNamespace(ids=ids, attention_mask=mask, scores=torch.ones(len(ids), 2))


def seconds_a_step(model, rows, retriever, tokenizer, prefetch: int) -> float:
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
        ends: list[float] = []
        step = trainer.training_step
        trainer.training_step = lambda *args, **kwargs: (step(*args, **kwargs), ends.append(time.perf_counter()))[0]
        trainer.train()
    return (ends[-1] - ends[1]) / (len(ends) - 2)  # the first steps warm up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latencies", type=float, nargs="+", default=[0.8, 2.0], help="in training steps")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = RetroConfig(vocab_size=8192, n_layer=6, n_embd=256, n_head=8, n_positions=512, cca_layers=[2, 5])
    model, retriever, tokenizer = RetroForCausalLM(config), SleepingRetriever(), source_tokenizer(source_files())
    tokens = torch.randint(1, 8192, (STEPS * BATCH, 512)).tolist()
    rows = Dataset.from_list([{"input_ids": row, "doc_ids": [["d"]] * 8} for row in tokens])
    collator = RetroDataCollator(retriever)
    stored = Dataset.from_list(
        [row | {n: v.tolist() for n, v in collator.neighbors_of([row])[0].items()} for row in rows]
    )
    print(f"{machine()}, {torch.get_num_threads()} torch threads; 6 layers of width 256, {BATCH} rows of 512 tokens")
    alone = statistics.median(seconds_a_step(model, stored, None, tokenizer, 0) for _ in range(2))
    print(f"a step with neighbors already there takes about {alone:.3f} s")
    for latency in arguments.latencies:
        ways = {
            "neighbors there": lambda: seconds_a_step(model, stored, None, tokenizer, 0),
            "fetched in the step": lambda: seconds_a_step(model, rows, retriever, tokenizer, 0),
            "fetched ahead": lambda: seconds_a_step(model, rows, retriever, tokenizer, 4),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, run in ways.items():
                taken[name].append(run())
                if name == "neighbors there":
                    retriever.seconds = latency * taken[name][-1]  # of the step as it is in this round
        print(f"\nretriever's latency: {latency} of a step")
        for name, values in taken.items():
            times = [value / base for value, base in zip(values, taken["neighbors there"], strict=True)]
            speeds = [BATCH * 512 / value for value in values]
            print(f"  {name:20s} {spread(times, digits=3)} steps; {spread(speeds, digits=0)} tokens/s")


if __name__ == "__main__":
    main()
