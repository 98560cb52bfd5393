"""Measure what training with random first points costs on the paper's grid and gains before it.

    python benchmarks/first_points.py runs/first_points    # minutes; can be resumed

The corpus is the beginnings of the model sources inside the transformers package. They are searched
by static embeddings: MiniLM's word vectors, frequent words weighted down (Arora et al., 2017). A
decoder of 4 layers and width 128 is trained alone and frozen. A copy head and cross-attention by
matches are then fitted onto it, for each seed once on the paper's grid and once with
`random_first_point`. Both read the same sequences.

Both are measured on held-out documents: on the paper's grid, and on the 64 tokens after a prompt of
8, 16 or 32 tokens whose end is a retrieval point. The 64 tokens are the same for every prompt.
Intervals are two standard errors over sequences.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import corpora
import torch
from datasets import Dataset, load_from_disk
from learning_to_read import train
from machine import MINILM, machine
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers import AutoModel, AutoTokenizer

from data_retro.collator import RetroDataCollator
from evaluation_retro import Evaluation, byte_lengths, evaluate, paired_gain
from modeling_retro import RetroForCausalLM
from retrieval import BulkTokenizer, Document, Embedder, MilvusRetriever, MilvusStore, ingest, read_documents

CHUNKS, CHUNK, BLOCK = 6_000, 64, 256
CHARACTERS = 6_000  # of a document
RARE = 1e-3  # share of the text at which a word's weight is a half
DECODER_STEPS = 200
HELD_OUT = 160  # sequences to measure
PROMPTS, LONGEST_PROMPT, CONTINUATION = (8, 16, 32), 32, 64
BATCH = 8
GRIDS = {"paper": "false", "random": "true"}  # values of random_first_point
MODEL = (
    "{n_layer: 4, n_embd: 128, n_head: 4, n_positions: 256, cca_layers: [1, 3], "
    "embd_pdrop: 0.0, attn_pdrop: 0.0, resid_pdrop: 0.0}"
)
READER = "{copy_head: true, cca_match: true}"


def save_embedding(texts: Sequence[str], folder: Path) -> None:
    """Save static embeddings, MiniLM's word vectors weighted by how rare the words are in texts."""
    minilm = AutoModel.from_pretrained(MINILM)
    tokenizer = AutoTokenizer.from_pretrained(MINILM).backend_tokenizer
    counts = Counter(word for text in texts for word in tokenizer.encode(text, add_special_tokens=False).ids)
    vectors = minilm.get_input_embeddings().weight.detach()
    share = torch.tensor([counts[word] for word in range(len(vectors))]) / counts.total()
    weighted = vectors * (RARE / (RARE + share))[:, None]
    embedding = StaticEmbedding(tokenizer, embedding_weights=weighted.numpy())
    SentenceTransformer(modules=[embedding], device="cpu").save_pretrained(str(folder))


def build_knowledge_base(folder: Path) -> None:
    """Write texts, tokenizer and embedding model, and ingest the training texts."""
    beginnings = (Document(document.id, document.text[:CHARACTERS]) for document in corpora.models())
    tokenizer = corpora.write(beginnings, folder, CHUNKS, CHUNK)
    documents = list(read_documents(str(folder / "train")))
    save_embedding([document.text for document in documents], folder / "embedding")
    store = MilvusStore(str(folder / "kb.db"), "text")
    try:
        ingest(documents, store, BulkTokenizer(tokenizer), Embedder(str(folder / "embedding"), device="cpu"))
    finally:
        store.close()


def prepare(folder: Path) -> None:
    """Make texts, tokenizer, knowledge base, decoder and precomputed neighbors, if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    new = {"tokenizer_name": folder / "tokenizer", "config_overrides": MODEL, "block_size": BLOCK}
    if not (folder / "kb.db").exists():
        build_knowledge_base(folder)
    if not (folder / "decoder" / "model.safetensors").exists():
        text = {"train_data": folder / "train", "output_dir": folder / "decoder"}
        train(**new, **text, max_steps=DECODER_STEPS, learning_rate=2e-3, per_device_train_batch_size=BATCH)
    place = {"knowledge_base": folder / "kb.db", "collection_name": "text", "embedding_model": folder / "embedding"}
    data = {"train_data": folder / "train", "validation_data": folder / "held_out", "output_dir": folder}
    for grid, is_random in GRIDS.items():
        if not (folder / grid).exists():
            train(**new, **place, **data, random_first_point=is_random, precompute_to=folder / grid)


def fit(folder: Path, grid: str, seed: int, steps: int) -> RetroForCausalLM:
    """Fit RETRO onto the decoder, unless that was done before, and load it."""
    output = folder / f"{grid}_{steps}_{seed}"
    if not (output / "model.safetensors").exists():
        settings = {"model_name_or_path": folder / "decoder", "precomputed": folder / grid, "block_size": BLOCK}
        settings |= {"config_overrides": READER, "freeze_backbone": "true", "seed": seed}
        settings |= {"learning_rate": 2e-3, "warmup_steps": 10}
        train(**settings, output_dir=output, max_steps=steps, per_device_train_batch_size=BATCH)
    return RetroForCausalLM.from_pretrained(output)


def after_prompt(sequences: Dataset, length: int) -> list[dict]:
    """Return what follows a prompt of `length` tokens in each sequence; its end is a point."""
    rows = []
    for sequence in sequences:
        tokens = sequence["input_ids"][LONGEST_PROMPT - length : LONGEST_PROMPT + CONTINUATION]
        if len(tokens) == length + CONTINUATION:
            labels = [-100] * length + tokens[length:]
            no_ids: list[list[str]] = [[]] * -(-len(tokens) // CHUNK)  # the knowledge base has no held-out document
            rows.append({"input_ids": tokens, "labels": labels, "doc_ids": no_ids, "first_point": length})
    return rows


def batches(rows: list[dict], collate: RetroDataCollator) -> list[dict[str, torch.Tensor]]:
    """Return rows in batches, with their neighbors."""
    return [collate(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]


def report(name: str, measured: dict[str, Evaluation]) -> str:
    """Return a line: bits per byte of decoder and models, and what random first points save."""
    paper, random = measured["paper"], measured["random"]
    saved, error = paired_gain(paper.condition_nats("on") - random.condition_nats("on"), paper.sizes[:, 0, 1])
    bits = (paper.bits_per_byte("off"), paper.bits_per_byte("on"), random.bits_per_byte("on"))
    return f"{name:28s}" + "".join(f"{value:9.4f}" for value in bits) + f"  {saved:+.4f} ± {2 * error:.4f}"


def main() -> None:
    """Print a line for each seed and each kind of query."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps texts, knowledge base and models")
    parser.add_argument("--seeds", type=int, default=3, help="fits of each kind")
    parser.add_argument("--steps", type=int, default=80, help="steps of a fit, 2,048 tokens each")
    arguments = parser.parse_args()
    folder = arguments.folder
    print(machine(), flush=True)
    prepare(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    held_out = load_from_disk(str(folder / "paper"))["validation"].shuffle(seed=0)
    held_out = held_out.select(range(min(HELD_OUT, len(held_out))))
    data = {"paper's grid": batches(list(held_out), RetroDataCollator())}
    retriever = MilvusRetriever.from_uri(
        folder / "kb.db", "text", tokenizer=tokenizer, embedding_model=str(folder / "embedding"), device="cpu"
    )
    for length in PROMPTS:
        data[f"after {length} tokens"] = batches(after_prompt(held_out, length), RetroDataCollator(retriever))
    retriever.close()
    print(json.dumps({name: sum(len(batch["input_ids"]) for batch in parts) for name, parts in data.items()}))
    print(f"{'bits per byte':28s}  decoder    paper   random  random saves", flush=True)
    for seed in range(arguments.seeds):
        models = {grid: fit(folder, grid, seed, arguments.steps) for grid in GRIDS}
        for name, parts in data.items():
            measured = {grid: evaluate(model, parts, byte_lengths(tokenizer)) for grid, model in models.items()}
            print(report(f"seed {seed}, {name}", measured), flush=True)


if __name__ == "__main__":
    main()
