"""Small promises: no secret in a message, no file or document lost in silence, an interrupted start made good."""

import subprocess
import sys

import pytest

from retrieval import Document, Identity, KnowledgeBaseError, MilvusRetriever, MilvusStore, ingest, read_documents
from retrieval.cli import main
from retrieval.store import IDENTITY

from .conftest import CHUNK


def test_a_password_in_the_uri_is_never_shown():
    with pytest.raises(KnowledgeBaseError) as caught:
        MilvusStore("http://root:S3cret@127.0.0.1:1/db", "c")
    assert "http://127.0.0.1:1/db" in str(caught.value) and "S3cret" not in str(caught.value)
    store = MilvusStore.__new__(MilvusStore)
    store.uri, store.collection_name, store.is_file = "https://root:S3c@ret@host:19530", "c", False
    assert repr(store) == "MilvusStore(collection 'c' at https://host:19530)"


def test_a_file_in_use_is_said_in_one_line(tmp_path, tokenizer, embedder):
    uri = str(tmp_path / "kb.db")
    store = MilvusStore(uri, "retro")
    ingest([Document("a", "text")], store, tokenizer, embedder, chunk_size=CHUNK)
    command = [sys.executable, "-m", "retrieval", "info", "--uri", uri]
    result = subprocess.run(command, capture_output=True, text=True)
    store.close()
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr


def test_an_exclusion_that_is_a_plain_string_is_refused(tmp_path, tokenizer, embedder):
    store = MilvusStore(tmp_path / "kb.db", "retro")
    ingest([Document("doc1", "text")], store, tokenizer, embedder, chunk_size=CHUNK)
    retriever = MilvusRetriever(store, tokenizer, embedder)
    with pytest.raises(ValueError, match=r"exclude_doc_ids\[0\] is 'doc1'"):
        retriever.retrieve([[1] * CHUNK], exclude_doc_ids=["doc1"])
    retriever.close()


def test_a_collection_whose_index_was_never_made_gets_it(tmp_path, tokenizer, embedder):
    store = MilvusStore(tmp_path / "kb.db", "retro")
    card = Identity.of(tokenizer, embedder, CHUNK).to_json()
    store.create(Identity.from_json(card, "here"))
    store.client.release_collection("retro")
    store.client.drop_index("retro", "embedding")
    assert store.exists() and store.client.list_indexes("retro") == ["embedding"]
    assert IDENTITY in store.client.describe_collection("retro")["properties"]
    store.close()


def test_files_are_read_as_they_are_and_what_is_not_text_is_left_out(tmp_path, caplog):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref")
    (tmp_path / "windows.txt").write_bytes(b"one\r\ntwo\r\n")
    (tmp_path / "binary").write_bytes(b"\0\1 text")
    assert list(read_documents(str(tmp_path))) == [Document("windows.txt", "one\r\ntwo\r\n")]
    assert "binary" in caplog.text
    (tmp_path / "rows.jsonl").write_text('{"text": 5}\n')
    with pytest.raises(ValueError, match="Row 0 of rows.jsonl: field 'text' is 5, not text"):
        list(read_documents(str(tmp_path / "rows.jsonl")))


def test_two_sources_with_the_same_document_id_are_refused(tmp_path, tokenizer_folder, embedding_folder, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"from {name}")
    models = ["--tokenizer", str(tokenizer_folder), "--embedding-model", str(embedding_folder)]
    with pytest.raises(SystemExit):
        main(["ingest", str(tmp_path / "a"), str(tmp_path / "b"), "--uri", str(tmp_path / "kb.db"), *models])
    assert "'README.md'" in capsys.readouterr().err
