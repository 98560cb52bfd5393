"""Fixtures: a trained tokenizer, a random embedding model, documents, Milvus Lite and a server."""

import pydoc_data.topics
import uuid

import pytest

from retrieval import BulkTokenizer, Document, Embedder

from ..support.milvus_server import MilvusServer
from ..support.places import Place
from ..support.small_models import save_static_embedding, train_tokenizer


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
    """Twelve documents of real text (Python's reference), and near-copies of three of them."""
    texts = [text[:700] for text in list(pydoc_data.topics.topics.values())[:12]]
    originals = [Document(f"topic {i}", text) for i, text in enumerate(texts)]
    copies = [Document(f"copy {c} of {i}", texts[i] + f" v{c}") for i in range(3) for c in range(12)]
    return originals + copies


@pytest.fixture(scope="session")
def server_process(tmp_path_factory):
    """A real Milvus server.

    Its tests are marked: they download 50 MB and take some seconds to start it.
    """
    server = MilvusServer(tmp_path_factory.mktemp("milvus") / "data")
    yield server
    server.stop()


@pytest.fixture
def server(server_process):
    """The same server, started again if the last test stopped it."""
    server_process.start()
    return server_process


@pytest.fixture
def uri(tmp_path):
    """The path of a Milvus Lite file that does not exist yet."""
    return str(tmp_path / "kb.db")


@pytest.fixture(params=["lite", pytest.param("server", marks=pytest.mark.server)])
def place(request, tmp_path):
    is_lite = request.param == "lite"
    uri = str(tmp_path / "kb.db") if is_lite else request.getfixturevalue("server").uri
    place = Place(uri, f"c{uuid.uuid4().hex[:12]}", is_lite)
    yield place
    for number, store in enumerate(place.opened):
        if not is_lite and not number:
            for name in store.connection.list_collections():
                store.connection.drop_collection(name)
        store.close()
