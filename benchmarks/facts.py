"""Train a copy head to answer questions about made-up facts, and ask it about others.

    python benchmarks/facts.py runs/facts --model demo_output/retro --texts FOLDER

`retro-eval facts` measures the model as it is. Then its copy head, and nothing else, learns from
the questions about facts of another seed, which share no name and no answer with those that are
asked. Their documents stand in a knowledge base of their own, among some of the real text. At last
the same questions are asked again. Everything is kept in the folder: a broken-off run goes on.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from machine import machine
from tqdm import tqdm

from data_retro import RetroDataCollator
from data_retro.collator import IGNORED_LABEL
from evaluation_retro.fact_answers import Prompts
from evaluation_retro.fact_base import FactBase, enough_text, roles_of
from evaluation_retro.facts import FactsSettings, run
from evaluation_retro.made_up_facts import Fact, make_up_facts, words_of, words_of_facts
from evaluation_retro.opening import Opened, open_model
from evaluation_retro.windows import read_texts
from modeling_retro.retrieval_points import aligned_first_point

TEXT_SHARE = 10  # one in so many chunks of real text stands among the facts to train on
LEARNING_RATE = 2e-3
BATCH = 16  # questions in a training step


def features_of(facts: Sequence[Fact], opened: Opened) -> list[dict]:
    """Return questions with answers, as the collator takes them. Only answers are predicted."""
    config, features = opened.model.config, []
    assert config.retrieval_stride is not None, "set when the configuration is built"
    for fact in facts:
        encoded = Prompts.encode(opened.tokenizer, [*fact.prompts.values()], [[fact.answer]] * len(fact.prompts))
        for tokens, (answer,) in zip(encoded.tokens, encoded.candidates, strict=True):
            features.append(
                {
                    "input_ids": [*tokens, *answer],
                    "labels": [IGNORED_LABEL] * len(tokens) + [*answer],
                    "first_point": aligned_first_point(len(tokens), config.chunk_size, config.retrieval_stride),
                    "doc_ids": [[]] * (len(tokens) // config.chunk_size + 2),  # the fact's document may be read
                }
            )
    return features


def train(opened: Opened, features: list[dict], epochs: int, seed: int) -> None:
    """Train the copy head; the decoder stays as it is."""
    model = opened.model
    assert model.config.copy_head, "facts are copied"
    model.freeze_backbone()
    collator = RetroDataCollator(model.retriever, model.config.retrieval_stride)
    optimizer = torch.optim.AdamW(model.copy_head.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(features), generator=generator).split(BATCH)
        for rows in (bar := tqdm(order, desc="Training")):
            batch = {name: value.to(model.device) for name, value in collator([features[row] for row in rows]).items()}
            loss = model(**batch, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")


def make_trained(settings: FactsSettings, folder: Path, facts: int, epochs: int) -> None:
    """Train a copy of the model and save it to a folder, unless it is there."""
    if (folder / "config.json").exists():
        return
    opened = open_model(replace(settings, dtype="float32"), builds_its_own=True)
    config = opened.model.config
    documents = read_texts(settings.texts, settings.text_field, settings.doc_id_field)
    texts = enough_text(documents, opened.tokenizer, config.chunk_size, settings.chunks)
    taken = words_of(document.text for document in texts)
    asked = make_up_facts(settings.facts, settings.seed, taken)
    new = make_up_facts(facts, settings.training_seed, taken | words_of_facts(asked))
    among = enough_text(texts, opened.tokenizer, config.chunk_size, settings.chunks // TEXT_SHARE)
    place = folder.with_name("training")
    base = FactBase(settings, place, opened.tokenizer, config, among, new, roles_of(len(new), 0))
    try:
        opened.model.set_retriever(base.retriever)
        started = time.monotonic()
        train(opened, features_of(new, opened), epochs, settings.training_seed)
        print(f"Trained on {2 * len(new)} questions, {epochs} times, in {time.monotonic() - started:.0f} s.")
    finally:
        base.close()
    opened.model.save_pretrained(folder)
    opened.tokenizer.hf_tokenizer.save_pretrained(folder)


def print_table(folder: Path) -> None:
    """Print what was measured before and after the training, with retrieval on."""
    print(
        "| asked in | copy head | exact match | right one ranked first | mean reciprocal rank |\n|---|---|---|---|---|"
    )
    for wording in ("own words", "other words"):
        for name in ("before", "after"):
            numbers = json.loads((folder / name / "facts.json").read_text(encoding="utf-8"))
            shares = (numbers["before"][wording]["on"][key] for key in ("exact_match", "first", "mrr"))
            shown = (f"{its['value']:.3f} [{its['low']:.3f}, {its['high']:.3f}]" for its in shares)
            print(f"| {wording} | {name} training | {' | '.join(shown)} |")


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps all that is computed")
    parser.add_argument("--model", required=True, help="RETRO with a copy head, or a decoder")
    parser.add_argument("--reader", help="a reader on the decoder, such as zero-shot")
    parser.add_argument("--texts", nargs="+", required=True, help="real text that the facts stand among")
    parser.add_argument("--chunks", type=int, default=20_000, help="default: %(default)s")
    parser.add_argument("--search", default="bm25", help="default: %(default)s")
    parser.add_argument("--embedding_model", help="for searches other than bm25")
    parser.add_argument("--dtype", default="bfloat16", help="of the model that is asked (default: %(default)s)")
    parser.add_argument("--asked", type=int, help="facts of 1000 that are asked (default: all)")
    parser.add_argument("--batch_size", type=int, default=32, help="questions asked at a time (default: %(default)s)")
    parser.add_argument("--training_facts", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=2, help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    """Measure, train, measure again, and print the table."""
    arguments = parse_arguments()
    print(machine(), flush=True)
    folder: Path = arguments.folder
    names = ("model", "reader", "texts", "chunks", "search", "embedding_model", "dtype", "asked", "batch_size")
    settings = FactsSettings(
        **{name: getattr(arguments, name) for name in names}, output_dir=str(folder / "before"), in_context=[0]
    )
    run(settings)
    make_trained(settings, folder / "trained", arguments.training_facts, arguments.epochs)
    after = folder / "after"
    if not after.exists():
        shutil.copytree(folder / "before" / "facts.db", after / "facts.db")
    run(replace(settings, model=str(folder / "trained"), reader=None, output_dir=str(after)))
    print_table(folder)


if __name__ == "__main__":
    main()
