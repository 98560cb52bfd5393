"""Addresses of knowledge bases: they work as people type them, or the error says what to type."""

import os
import re

import huggingface_hub
import pytest
import torch

from retrieval import (
    Embedder,
    KnowledgeBaseError,
    MilvusAddress,
    MilvusConnection,
    MilvusRetriever,
    MilvusStore,
    ingest,
)
from retrieval.addresses import locate
from retrieval.cli import main

from ..support.places import CHUNK


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder that is both the working directory and the home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_all_ways_to_write_one_file_share_a_connection(folder):
    """The file stays open until the last of them closes."""
    (folder / "link.db").symlink_to(folder / "kb.db")
    uris = [
        "kb.db",
        "./kb.db",
        "kb.db/",
        "~/kb.db",
        "link.db",
        folder / "kb.db",
        f"file://{folder}/kb.db",
        "file://kb.db",
    ]
    uris += [
        f" {folder}/kb.db\n",
        f"file://localhost{folder}/kb.db",
        f"FILE:{folder}/kb.db",
        b"kb.db",
        "../" + folder.name + "/kb.db",
    ]
    connections = [MilvusConnection(uri) for uri in uris]
    assert len({connection.serving for connection in connections}) == 1
    os.chdir("/")
    for connection in connections:
        assert connection.owns_file and (folder / "kb.db.served").exists()
        assert connection.list_collections() == []
        connection.close()
    assert not (folder / "kb.db.served").exists()


def test_unusual_file_names_are_taken(folder):
    assert locate("file:///a%20b/kb.db") == ("file:///a%20b/kb.db", "/a b/kb.db")
    for uri in ("KB.DB", "missing/folder/kb.db", "a b é.db"):
        MilvusConnection(uri).close()
        assert (folder / uri).is_dir()


def test_a_server_needs_no_scheme_and_may_end_in_a_slash():
    assert locate("localhost:19530") == locate("http://localhost:19530/") == ("http://localhost:19530", None)
    assert locate("root:S3c@ret@localhost:19530/b") == ("http://root:S3c@ret@localhost:19530/b", None)
    assert locate("127.0.0.1:19530/books") == ("http://127.0.0.1:19530/books", None)
    assert locate("tcp://milvus:19530") == ("tcp://milvus:19530", None)


@pytest.mark.parametrize(
    "uri, words",
    [
        ("kb", r"'kb' names no knowledge base\. Give http://host:port, or a file that ends in \.db \(kb\.db\)"),
        ("", "No knowledge base is named.*MILVUS_URI"),
        (" ", "No knowledge base is named"),
        ("grpc://host:1", "'grpc://host:1' does not name a knowledge base: give http"),
        ("http://", "not the address of a server"),
        ("http://host:99999", "a port from 1 to 65535"),
        ("localhost:1", "No connection to http://localhost:1: nothing answers"),
        ("plain.db", r"plain\.db is not a Milvus Lite knowledge base.*but a file"),
        ("plain.db/kb.db", r"plain\.db is not a folder"),
        ("full.db", r"full\.db is not a Milvus Lite knowledge base.*other things in it"),
        ("/proc/kb.db", r"/proc/kb\.db cannot be opened: .*there and writable"),
    ],
)
def test_a_wrong_address_is_explained_and_makes_no_file(folder, monkeypatch, uri, words):
    monkeypatch.setenv("MILVUS_URI", "")
    (folder / "plain.db").write_text("a text")
    (folder / "full.db").mkdir()
    (folder / "full.db" / "text.txt").write_text("a text")
    with pytest.raises(KnowledgeBaseError, match=words):
        MilvusConnection(MilvusAddress(uri, timeout=3))
    assert sorted(path.name for path in folder.rglob("*")) == ["full.db", "plain.db", "text.txt"]


@pytest.mark.parametrize("variable", [None, ""])
def test_a_missing_address_is_named_with_the_variable_that_could_hold_it(monkeypatch, variable):
    if variable is None:
        monkeypatch.delenv("MILVUS_URI", raising=False)
    else:
        monkeypatch.setenv("MILVUS_URI", variable)
    with pytest.raises(KnowledgeBaseError, match="No knowledge base is named.*MILVUS_URI"):
        MilvusConnection(None)


@pytest.mark.parametrize(
    "uri, shown",
    [
        ("http://root:S3c@ret@127.0.0.1:1/db", "http://127.0.0.1:1/db"),
        ("http://root:S3c@ret@127.0.0.1:x", "'http://127.0.0.1:x'"),
        ("ftp://root:S3c@ret@h", "'ftp://h'"),
        ("root:S3c@ret@127.0.0.1:1", "http://127.0.0.1:1:"),
        ("root:S3c@ret@127.0.0.1", "'127.0.0.1'"),
        ("root:S3c://ret@127.0.0.1:1", "'127.0.0.1:1'"),
        ("root:S3c@ret@http://h:1", "'http://h:1'"),
        ("http:/root:S3c@ret@h:1", "'h:1'"),
        ("http:/root:S3c@ret@h/kb.db", "'h/kb.db'"),
        ("http//root:S3c@ret@h:1", "'h:1'"),
        ("file:root:S3c@ret@x", "'x'"),
    ],
)
def test_a_password_in_the_uri_is_never_shown(uri, shown):
    with pytest.raises(KnowledgeBaseError) as caught:
        MilvusStore(MilvusAddress(uri, timeout=1), "c")
    assert shown in str(caught.value) and "S3c" not in str(caught.value) and "ret@" not in str(caught.value)


@pytest.mark.parametrize("name", ["a-b", "a b", "été", "1a", "", "a.b", "a" * 256])
def test_collection_names_that_servers_refuse_are_refused(folder, name):
    with pytest.raises(ValueError, match="ASCII letters, digits and underscores, no digit first, at most 255"):
        MilvusStore("kb.db", name)
    assert not (folder / "kb.db").exists()


def test_a_collection_name_that_only_milvus_lite_allows_still_opens(folder, documents, tokenizer, embedder):
    store = MilvusStore("kb.db", "texts")
    ingest(documents[:1], store, tokenizer, embedder, chunk_size=CHUNK)
    rows = store.count()
    store.connection.client.rename_collection("texts", "my-texts")
    store.close()
    store = MilvusStore.open("kb.db", "my-texts")
    assert store.count() == rows
    with pytest.raises(ValueError, match="'other-texts' is not a collection's name"):
        MilvusStore("kb.db", "other-texts").create(store.identity())
    store.close()


def test_retriever_settings_out_of_range_are_refused(folder, documents, tokenizer, embedder):
    store = MilvusStore("kb.db", "_ok")
    ingest(documents[:1], store, tokenizer, embedder, chunk_size=CHUNK)
    more = store.count() + 5
    found = MilvusRetriever(store, tokenizer, embedder, num_neighbors=more).retrieve([[7] * CHUNK])
    assert found.attention_mask.any(-1).sum() == more - 5  # missing neighbors are masked out
    for setting, words in {
        ("num_neighbors", 0): "from 1 to 16376, not 0",
        ("num_neighbors", 20_000): "from 1 to 16376, not 20000",
        ("cache_size", -1): "cache_size is -1",
    }.items():
        with pytest.raises(ValueError, match=words):
            MilvusRetriever(store, tokenizer, embedder, **dict([setting]))
    store.close()


def test_missing_embedding_models_and_devices_are_named(folder, embedding_folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (folder / "texts").mkdir()
    for name in ("no/such-model", "texts"):
        with pytest.raises(OSError, match=rf"(?s)Cannot load the embedding model '.*{name}': .*\. Give the name"):
            Embedder(name)
    with pytest.raises(ValueError, match="There is no device 'gpu' here"):
        Embedder(embedding_folder, device="gpu")


def test_too_little_memory_is_not_reported_as_a_wrong_name(embedding_folder, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("sentence_transformers.SentenceTransformer", full)
    with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory$"):
        Embedder(embedding_folder)


def test_an_empty_query_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["search", " ", "--uri", "kb.db"])
    assert ended.value.code == 2 and re.search("search: error: The text .* is empty", capsys.readouterr().err)
