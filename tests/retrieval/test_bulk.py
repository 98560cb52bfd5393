"""Bulk files: Milvus imports them, and an interrupted or changed run leaves whole parts."""

import shutil
import time

import pytest
from pymilvus import connections, utility

from retrieval import BulkTokenizer, Document, Identity, IdentityMismatch, MilvusStore, bulk, chunking, ingest
from retrieval.bulk import write_bulk_files

from ..support.places import CHUNK, expected_rows, rows_of
from ..support.small_models import train_tokenizer


def write(documents, folder, tokenizer, embedder, **kwargs):
    return write_bulk_files(documents, folder, tokenizer, embedder, chunk_size=CHUNK, **kwargs)


def parts(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".parquet")


# Milvus 2.3 imports through this interface alone; newer servers have an HTTP one
@pytest.mark.filterwarnings("ignore:.* is an ORM-style PyMilvus API:FutureWarning")
@pytest.mark.server
def test_a_server_imports_the_rows_of_an_ingestion(server, tmp_path, documents, tokenizer, embedder):
    half = len(documents) // 2
    write(documents[:half], tmp_path, tokenizer, embedder)  # as two processes would
    write(documents[half:], tmp_path, tokenizer, embedder, rank=1)
    store = MilvusStore(server.uri, "bulk")
    store.create(Identity.of(tokenizer, embedder, CHUNK))
    inside = server.folder / "data" / "bulk"  # the server reads its own storage
    shutil.copytree(tmp_path, inside)
    connections.connect("bulk", uri=server.uri)
    for file in inside.glob("*.parquet"):
        task = utility.do_bulk_insert("bulk", files=[str(file)], using="bulk")
        deadline = time.monotonic() + 600
        while (state := utility.get_bulk_insert_state(task, using="bulk")).state_name != "Completed":
            assert "Failed" not in state.state_name and time.monotonic() < deadline, state
            time.sleep(0.3)
    store.connection.client.refresh_load(store.collection_name)
    deadline = time.monotonic() + 600
    while store.count() < len(expected_rows(documents, tokenizer)) and time.monotonic() < deadline:
        time.sleep(0.3)
    assert rows_of(store) == expected_rows(documents, tokenizer)
    again = ingest(documents, store, tokenizer, embedder, chunk_size=CHUNK)  # an ingestion continues from there
    assert (again.chunks_written, again.chunks_unchanged) == (0, len(expected_rows(documents, tokenizer)))


def test_an_interrupted_run_leaves_whole_parts_and_the_next_continues(
    tmp_path, monkeypatch, documents, tokenizer, embedder
):
    monkeypatch.setattr(bulk, "PART", 20)
    monkeypatch.setattr(chunking, "BATCH_DOCUMENTS", 4)

    def broken():
        yield from documents[:30]
        deadline = time.monotonic() + 600
        while not parts(folder) and time.monotonic() < deadline:
            time.sleep(0.01)  # reading runs ahead of writing
        raise OSError("the disk is gone")

    whole, folder = tmp_path / "whole", tmp_path / "folder"
    write(documents, whole, tokenizer, embedder)
    with pytest.raises(OSError, match="the disk is gone"):
        write(broken(), folder, tokenizer, embedder)
    left = parts(folder)
    assert left and set(left) <= set(parts(whole)) and len(left) < len(parts(whole))
    report = write(documents, folder, tokenizer, embedder)
    assert parts(folder) == parts(whole)
    assert 0 < report.chunks_unchanged < len(expected_rows(documents, tokenizer))
    assert report.chunks_unchanged + report.chunks_written == len(expected_rows(documents, tokenizer))
    assert {path.name for path in folder.iterdir()} == {*parts(whole), "identity.json"}


def test_parts_of_documents_that_changed_are_replaced(tmp_path, documents, tokenizer, embedder):
    write(documents, tmp_path, tokenizer, embedder)
    (before,) = parts(tmp_path)
    write([Document(documents[0].id, "Another text."), *documents[1:]], tmp_path, tokenizer, embedder)
    (after,) = parts(tmp_path)
    assert before != after


def test_an_id_that_comes_twice_is_refused(tmp_path, documents, tokenizer, embedder):
    with pytest.raises(ValueError, match=f"{documents[0].id!r} comes twice"):
        write([*documents, documents[0]], tmp_path, tokenizer, embedder)
    assert not parts(tmp_path)


def test_a_folder_of_another_tokenizer_is_refused(tmp_path, documents, tokenizer, embedder):
    write(documents[:2], tmp_path, tokenizer, embedder)
    other = BulkTokenizer(train_tokenizer(["another text"] * 9, vocab_size=300))
    with pytest.raises(IdentityMismatch, match="has files of another knowledge base"):
        write(documents[:2], tmp_path, other, embedder)
