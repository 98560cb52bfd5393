"""Fixtures of training: a small tokenizer and model, and a knowledge base made of arithmetic."""

import pydoc_data.topics
from dataclasses import dataclass

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from configuration_retro import RetroConfig
from retrieval import BulkTokenizer, Embedder, MilvusStore, ingest, read_documents

from .small_models import save_static_embedding, train_tokenizer

CHUNK, NEIGHBOR = 8, 16

TEXTS = [
    "A chunk is complete when its last token is known; its neighbors are then fetched and read.\n",
    "The encoder reads each neighbor on its own, in both directions, and attends to the chunk's states.\n",
    "Käse, naïveté, 数学 and 🙂: text is bytes, and a token may cut a character in two.\n",
    "Documents are joined by end-of-text and cut into sequences of equal length, with no token lost.\n",
]


@pytest.fixture
def texts():
    return TEXTS


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 320).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)


@pytest.fixture
def config(tokenizer):
    return RetroConfig(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_layer=4,
        n_embd=32,
        n_head=4,
        cca_layers=(1, 3),
        chunk_size=CHUNK,
        neighbor_length=NEIGHBOR,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


@dataclass
class FoundNeighbors:
    ids: torch.Tensor
    attention_mask: torch.Tensor
    doc_ids: list
    chunk_indices: torch.Tensor
    scores: torch.Tensor


class ArithmeticRetriever:
    """Computes neighbors from the query: neighbor i is its tokens plus i + 1, twice.

    The last position is padding, and so are those that a query shorter than a chunk leaves.
    """

    chunk_size, num_neighbors, neighbor_length = CHUNK, 2, NEIGHBOR
    embedding_model, collection_name = "tests/arithmetic", "numbers"

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.calls: list[tuple[list[list[int]], list]] = []

    def retrieve(self, chunks, exclude_doc_ids=None):
        chunks = [[*map(int, chunk)] for chunk in chunks]
        self.calls.append((chunks, exclude_doc_ids))
        n = len(chunks)
        ids = torch.zeros(n, 2, NEIGHBOR, dtype=torch.long)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for place, chunk in enumerate(chunks):
            twice = torch.tensor(chunk + chunk)
            for i in range(2):
                ids[place, i, : len(twice)] = (twice + i + 1) % self.vocab_size
            mask[place, :, : min(len(twice), NEIGHBOR - 1)] = True
        scores = torch.full((n, 2), 0.5)
        return FoundNeighbors(ids, mask, [["a", "b"]] * n, torch.zeros(n, 2, dtype=torch.long), scores)


@pytest.fixture
def retriever(tokenizer):
    return ArithmeticRetriever(len(tokenizer))


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer_folder, tokenizer):
    """A folder of texts, an embedding model, and a knowledge base of the training texts."""
    root = tmp_path_factory.mktemp("world")
    topics = list(pydoc_data.topics.topics.values())
    for part, texts in (("train", topics[:8]), ("held_out", topics[8:12])):
        (root / part).mkdir()
        for number, text in enumerate(texts):
            (root / part / f"{number}.txt").write_text(text[:600], encoding="utf-8")
    save_static_embedding(tokenizer, root / "embedding", dim=32, seed=0)
    store = MilvusStore(str(root / "kb.db"), "texts")
    embedder = Embedder(str(root / "embedding"), device="cpu")
    ingest(read_documents(str(root / "train")), store, BulkTokenizer(tokenizer), embedder, chunk_size=CHUNK)
    store.close()
    return root
