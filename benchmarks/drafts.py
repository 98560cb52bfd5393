"""Measure what drafts from neighbors save in generation, beside the decoder and prompt lookup.

    python benchmarks/drafts.py --model RETRO --knowledge_base kb.db --prompts FOLDER

The prompts are the beginnings of files that the knowledge base does not have. All sides continue
the same prompt greedily, in turns. Tokens a second are medians over the prompts, with the least and
the most; prefill and searches count. A side whose text differs from that of the same model without
drafts is reported. Tokens a forward say how many tokens one pass yields.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from machine import machine, spread
from tqdm import tqdm

from evaluation_retro.opening import ModelSettings, open_model, plain_decoder
from evaluation_retro.windows import read_texts

LOOKUP = 10  # tokens of the library's prompt lookup
DECODER, LOOKED_UP, OFF, ON, DRAFTS = "decoder", "decoder, prompt lookup", "RETRO, off", "RETRO", "RETRO, drafts"
SAME_TEXT = {LOOKED_UP: DECODER, DRAFTS: ON}


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a trained RETRO")
    parser.add_argument("--knowledge_base", required=True, help="its knowledge base")
    parser.add_argument("--prompts", nargs="+", required=True, help="files or folders with other texts")
    parser.add_argument("--embedding_model", help="default: the knowledge base's")
    parser.add_argument("--dtype", default="float32", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=8, help="prompts (default: %(default)s)")
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
        LOOKED_UP: (decoder, {"prompt_lookup_num_tokens": LOOKUP}),
        OFF: (model, {"use_retrieval": False}),
        ON: (model, {}),
        DRAFTS: (model, {"draft_from_neighbors": True}),
    }
    texts = (opened.tokenizer.encode_batch([its.text])[0] for its in read_texts(arguments.prompts, "text", None))
    prompts = list(
        islice((text[: arguments.prompt] for text in texts if len(text) > arguments.prompt), arguments.rounds)
    )
    length = {"max_new_tokens": arguments.new, "min_new_tokens": arguments.new, "do_sample": False, "pad_token_id": 0}
    if not prompts:
        raise SystemExit(
            f"No text is longer than {arguments.prompt} tokens. Give longer --prompts or a smaller --prompt."
        )
    rates: dict[str, list[float]] = {name: [] for name in sides}
    forwards: dict[str, list[float]] = {name: [] for name in sides}
    differing = dict.fromkeys(SAME_TEXT, 0)
    counts = {name: count_forwards(side) for name, (side, _) in sides.items()}
    for number, prompt in enumerate(tqdm(prompts, desc="Prompts")):
        ids, written = torch.tensor([prompt], device=model.device), {}
        for name, (side, settings) in sides.items():
            given = {"attention_mask": torch.ones_like(ids), **length, **settings}
            if not number:
                side.generate(ids, **given | {"max_new_tokens": 8, "min_new_tokens": 8})
            before = counts[name]()
            started = time.perf_counter()
            written[name] = side.generate(ids, **given)
            rates[name].append(arguments.new / (time.perf_counter() - started))
            forwards[name].append(arguments.new / (counts[name]() - before))
        for name, same in SAME_TEXT.items():
            differing[name] += not torch.equal(written[name], written[same])
    opened.close()
    base = statistics.median(rates[DECODER])
    print("| | tokens/s | of the decoder's | tokens a forward | other texts |\n|---|---|---|---|---|")
    for name in sides:
        print(
            f"| {name} | {spread(rates[name], '')} | {statistics.median(rates[name]) / base:.2f} | "
            f"{statistics.mean(forwards[name]):.2f} | {differing.get(name, '')} |"
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
