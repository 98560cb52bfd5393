"""Measure what drafts from neighbors save in generation, beside the decoder and prompt lookup.

    python benchmarks/drafts.py --model RETRO --knowledge_base kb.db --texts FOLDER

The prompts are from random places of documents that the knowledge base does not have. All sides
continue the same prompt greedily, in turns; prefill and searches count. A decoder that repeats
itself helps all drafts. With `--write file`, all sides are made to write the document's own next
tokens instead: with the texts of another subject, drafts are nearly always wrong.

Tokens a second, and their ratio to the decoder's on the same text, are medians over the texts, with
the least and the most. Tokens a forward say how many tokens one pass yields. A side whose text
differs from that of the same model without drafts is reported.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from forced import Forced
from machine import machine, spread
from tqdm import tqdm
from transformers import LogitsProcessorList

from evaluation_retro.opening import ModelSettings, open_model, plain_decoder
from evaluation_retro.rival_generation import GREEDY, PROMPT_LOOKUP
from evaluation_retro.windows import TextSettings, draw_windows

DECODER, LOOKED_UP, OFF, ON, DRAFTS = "decoder", "decoder, prompt lookup", "RETRO, off", "RETRO", "RETRO, drafts"
SAME_TEXT = {LOOKED_UP: DECODER, DRAFTS: ON}
MODEL, FILE = "model", "file"


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a trained RETRO")
    parser.add_argument("--knowledge_base", required=True, help="its knowledge base")
    parser.add_argument("--texts", nargs="+", required=True, help="files or folders with other texts")
    parser.add_argument("--embedding_model", help="default: the knowledge base's")
    parser.add_argument("--dtype", default="float32", help="default: %(default)s")
    parser.add_argument(
        "--write", choices=(MODEL, FILE), default=MODEL, help="whose tokens (default: the %(default)s's)"
    )
    parser.add_argument("--rounds", type=int, default=8, help="texts (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--new", type=int, default=128, help="new tokens (default: %(default)s)")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Print the table."""
    arguments = parse_arguments()
    print(machine(), flush=True)
    names = ("model", "knowledge_base", "embedding_model", "dtype")
    opened = open_model(ModelSettings(**{name: getattr(arguments, name) for name in names}))
    model, decoder = opened.model, plain_decoder(opened.model)
    sides: dict[str, tuple[Any, dict[str, Any]]] = {
        DECODER: (decoder, {}),
        LOOKED_UP: (decoder, {"prompt_lookup_num_tokens": PROMPT_LOOKUP}),
        OFF: (model, {"use_retrieval": False}),
        ON: (model, {}),
        DRAFTS: (model, {"draft_from_neighbors": True}),
    }
    settings = TextSettings(arguments.texts, window=arguments.prompt + arguments.new, windows=arguments.rounds)
    windows = draw_windows(settings.documents(), opened.tokenizer, settings).tokens.to(model.device)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    forwards: dict[str, list[float]] = {name: [] for name in sides}
    differing = dict.fromkeys(SAME_TEXT, 0)
    counts = {name: count_forwards(side) for name, (side, _) in sides.items()}
    for number, window in enumerate(tqdm(windows, desc="Texts")):
        ids, written = window[None, : arguments.prompt], {}
        given: dict[str, Any] = {"attention_mask": torch.ones_like(ids), **GREEDY}
        if arguments.write == FILE:
            given["logits_processor"] = LogitsProcessorList([Forced(window[None])])
        for name, (side, its_own) in sides.items():
            if not number:
                side.generate(ids, **given, **its_own, max_new_tokens=8)
            before = counts[name]()
            started = time.perf_counter()
            written[name] = side.generate(ids, **given, **its_own, max_new_tokens=arguments.new)
            rates[name].append(arguments.new / (time.perf_counter() - started))
            forwards[name].append(arguments.new / (counts[name]() - before))
        for name, same in SAME_TEXT.items():
            differing[name] += not torch.equal(written[name], written[same])
    opened.close()
    print_table(rates, forwards, differing)


def print_table(rates: dict[str, list[float]], forwards: dict[str, list[float]], differing: dict[str, int]) -> None:
    """Print a row for each side."""
    print("| | tokens/s | of the decoder's on the same text | tokens a forward | other texts |\n|---|---|---|---|---|")
    for name, its_rates in rates.items():
        ratios = [rate / base for rate, base in zip(its_rates, rates[DECODER], strict=True)]
        print(
            f"| {name} | {spread(its_rates, '')} | {spread(ratios, '', 2)} | "
            f"{statistics.mean(forwards[name]):.2f} | {differing.get(name, '')} |",
            flush=True,
        )


def count_forwards(model: torch.nn.Module) -> Callable[[], int]:
    """Return a function that tells how often a model has been called since."""
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    model.register_forward_pre_hook(count)
    return lambda: calls[0]


if __name__ == "__main__":
    main()
