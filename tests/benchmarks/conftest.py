"""The benchmarks' modules can be imported, as when a benchmark runs; a small corpus and decoder."""

import pydoc_data.topics
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from retrieval import BulkTokenizer, Document

from ..support.small_models import save_static_embedding, train_tokenizer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from search_rows import Row  # noqa: E402
from searches import Bench  # noqa: E402
from splits import SplitSize  # noqa: E402

SIZE = SplitSize(chunks=60, chunk_size=8, length=32, training=8, held_out=6)


@pytest.fixture(scope="module")
def documents():
    return [Document(name, text) for name, text in sorted(pydoc_data.topics.topics.items())[:60]]


@pytest.fixture(scope="module")
def hf_tokenizer(documents):
    return train_tokenizer([document.text for document in documents], 500)


@pytest.fixture(scope="module")
def tokenizer(hf_tokenizer):
    return BulkTokenizer(hf_tokenizer)


@pytest.fixture(scope="module")
def decoder(hf_tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(hf_tokenizer), **sizes)).eval()


@pytest.fixture(scope="module")
def row(hf_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "static"
    return Row("dense", "MiniLM", str(save_static_embedding(hf_tokenizer, folder, dim=16, seed=0)))


@pytest.fixture
def bench(tmp_path, documents, decoder, tokenizer):
    return Bench(tmp_path / "reference", lambda: documents, decoder, tokenizer, SIZE)
