"""Small promises: no secret in a message, no file or document lost in silence, an interrupted start made good."""

import pytest

from retrieval import (
    Document,
    Identity,
    KnowledgeBaseError,
    MilvusAddress,
    MilvusRetriever,
    MilvusStore,
    ingest,
    read_documents,
)
from retrieval.cli import main
from retrieval.collection import IDENTITY

from ..support.places import CHUNK


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
    store.connection.client.release_collection("retro")
    store.connection.client.drop_index("retro", "embedding")
    assert store.exists() and store.connection.client.list_indexes("retro") == ["embedding"]
    assert IDENTITY in store.connection.client.describe_collection("retro")["properties"]
    store.close()


def test_files_are_read_as_they_are_and_what_is_not_text_is_left_out(tmp_path, caplog):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref")
    (tmp_path / "windows.txt").write_bytes(b"one\r\ntwo\r\n")
    (tmp_path / "binary").write_bytes(b"\0\1 text")
    name = tmp_path.name
    expected = Document(f"{name}/windows.txt", "one\r\ntwo\r\n", {"source": name})
    assert list(read_documents(str(tmp_path))) == [expected]
    assert "binary" in caplog.text
    (tmp_path / "rows.jsonl").write_text('{"text": 5}\n')
    with pytest.raises(ValueError, match="Row 0 of rows.jsonl: field 'text' is 5, not text"):
        list(read_documents(str(tmp_path / "rows.jsonl")))


def test_two_sources_with_the_same_name_are_refused(tmp_path, tokenizer_folder, embedding_folder, capsys):
    for name in ("a", "b"):
        (tmp_path / name / "texts").mkdir(parents=True)
        (tmp_path / name / "texts" / "README.md").write_text(f"from {name}")
    models = ["--tokenizer", str(tokenizer_folder), "--embedding-model", str(embedding_folder)]
    sources = [str(tmp_path / name / "texts") for name in ("a", "b")]
    with pytest.raises(SystemExit):
        main(["ingest", *sources, "--uri", str(tmp_path / "kb.db"), *models])
    assert "have the same name" in capsys.readouterr().err
