"""A byte-level BPE tokenizer trained on real text, a fast embedding model with random weights, and a Milvus Lite file."""

import pydoc_data.topics

import pytest

from retrieval import BulkTokenizer, Document, Embedder

from ..small_models import save_static_embedding, train_tokenizer

CHUNK = 8


@pytest.fixture(scope="session")
def hf_tokenizer():
    return train_tokenizer(list(pydoc_data.topics.topics.values())[:20], 1000)


@pytest.fixture(scope="session")
def tokenizer(hf_tokenizer):
    return BulkTokenizer(hf_tokenizer)


@pytest.fixture(scope="session")
def tokenizer_folder(hf_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    hf_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def embedding_folder(hf_tokenizer, tmp_path_factory):
    return save_static_embedding(hf_tokenizer, tmp_path_factory.mktemp("models") / "random-static", dim=48, seed=0)


@pytest.fixture(scope="session")
def other_embedding_folder(hf_tokenizer, tmp_path_factory):
    return save_static_embedding(hf_tokenizer, tmp_path_factory.mktemp("models") / "random-static", dim=48, seed=1)


@pytest.fixture(scope="session")
def embedder(embedding_folder):
    return Embedder(str(embedding_folder), device="cpu")


@pytest.fixture(scope="session")
def documents():
    """Python's reference: real text, 12 documents of some hundred words, and near-copies of three of them."""
    texts = [text[:700] for text in list(pydoc_data.topics.topics.values())[:12]]
    originals = [Document(f"topic {i}", text) for i, text in enumerate(texts)]
    copies = [Document(f"copy {c} of {i}", texts[i] + f" v{c}") for i in range(3) for c in range(12)]
    return originals + copies
