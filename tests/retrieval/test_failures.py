"""Failures of Milvus: the library waits if that helps, explains the rest, and loses nothing."""

import contextlib
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from pymilvus import MilvusException
from transformers import AutoTokenizer

import retrieval.cli
from retrieval import (
    TLS,
    BulkTokenizer,
    Chunk,
    Document,
    Embedder,
    IndexSettings,
    KnowledgeBaseError,
    MilvusAddress,
    MilvusConnection,
    MilvusRetriever,
    MilvusStore,
    ingest,
)
from retrieval.failures import is_transient

from ..support.milvus_server import MilvusServer
from ..support.places import CHUNK, expected_rows, rows_of
from ..support.processes import ACCELERATE, Forked


@pytest.mark.server
class TestServer:
    def test_a_collection_that_was_dropped_is_named(self, server, documents, tokenizer, embedder):
        store = MilvusStore(server.uri, "dropped")
        ingest(documents[:2], store, tokenizer, embedder, chunk_size=CHUNK)
        retriever = MilvusRetriever(store, tokenizer, embedder)
        other = MilvusStore(server.uri, "dropped")
        other.connection.drop_collection(other.collection_name)
        for do in (lambda: retriever.retrieve([[7] * CHUNK]), store.count, lambda: store.delete(["a"])):
            with pytest.raises(KnowledgeBaseError, match="'dropped' at http.* was dropped or renamed"):
                do()

    def test_a_collection_that_was_released_is_loaded_again(self, server, documents, tokenizer, embedder):
        store = MilvusStore(server.uri, "released")
        ingest(documents[:2], store, tokenizer, embedder, chunk_size=CHUNK)
        retriever = MilvusRetriever(store, tokenizer, embedder)
        store.connection.release_collection(store.collection_name)
        assert retriever.retrieve([[7] * CHUNK]).attention_mask.any()

    def test_a_missing_database_is_named(self, server):
        with pytest.raises(KnowledgeBaseError, match="no database 'nope' at http"):
            MilvusStore(MilvusAddress(server.uri, database="nope"), "c")
        with pytest.raises(KnowledgeBaseError, match="no database .* at http.*/nope2"):
            MilvusStore(f"{server.uri}/nope2", "c")

    def test_another_database_has_other_collections(self, server, documents, tokenizer, embedder):
        MilvusConnection(server.uri).client.create_database("second")
        store = MilvusStore(MilvusAddress(server.uri, database="second"), "c")
        ingest(documents[:1], store, tokenizer, embedder, chunk_size=CHUNK)
        assert MilvusStore.open(f"{server.uri}/second", "c").count() == store.count()
        assert not MilvusStore(server.uri, "c").exists()


@pytest.mark.server
def test_searches_wait_while_an_index_is_built(server, documents, tokenizer, embedder):
    """The collection is not loaded then. Searches wait, and find the same as before."""
    store = MilvusStore(server.uri, "indexing")
    ingest(documents, store, tokenizer, embedder, chunk_size=CHUNK)
    retriever = MilvusRetriever(MilvusStore(server.uri, "indexing"), tokenizer, embedder)
    chunks = [list(row[2]) for row in rows_of(store) if len(row[2]) == CHUNK][:5]
    before = retriever.retrieve(chunks).scores
    with ThreadPoolExecutor(1) as pool:
        built = pool.submit(lambda: [store.reindex(IndexSettings.parse(kind)) for kind in ("HNSW", "IVF_FLAT", "FLAT")])
        searched = 0
        while not built.done() or not searched:
            np.testing.assert_allclose(retriever.retrieve(chunks).scores, before, atol=1e-5)
            searched += 1
        built.result()


@pytest.mark.server
def test_an_index_is_built_although_others_load_the_collection(server, documents, tokenizer, embedder, monkeypatch):
    """A search loads the collection, and Milvus drops no index of a loaded collection."""
    store, other = MilvusStore(server.uri, "again"), MilvusStore(server.uri, "again")
    ingest(documents, store, tokenizer, embedder, chunk_size=CHUNK)
    drop_index, loads = store.connection.drop_index, iter(range(2))

    def interrupted(name, index):
        if next(loads, None) is not None:
            other.connection.load_collection(name)
        drop_index(name, index)

    monkeypatch.setattr(store.connection, "drop_index", interrupted)
    store.reindex(IndexSettings.parse("HNSW"))
    assert next(loads, None) is None
    assert other.connection.describe_index("again", "embedding")["index_type"] == "HNSW"


@pytest.mark.server
def test_a_server_away_for_half_a_minute_loses_nothing(server, documents, tokenizer, embedder):
    """An ingestion and searches wait for the killed server, continue, and miss nothing."""
    half = len(documents) // 2
    store = MilvusStore(server.uri, "outage")
    ingest(documents[:half], store, tokenizer, embedder, chunk_size=CHUNK)
    retriever = MilvusRetriever(store, tokenizer, embedder)
    chunks = [list(row[2]) for row in rows_of(store) if len(row[2]) == CHUNK][:5]
    before = retriever.retrieve(chunks).scores
    searched, reading, gone, ended = (threading.Event() for _ in range(4))

    def rest():
        yield from documents[half:-2]
        reading.set()
        assert gone.wait(600)
        yield from documents[-2:]

    def search():
        found = []
        while not ended.is_set():
            found.append(retriever.retrieve(chunks).scores)
            searched.set()
        return found

    with ThreadPoolExecutor(2) as pool:
        searches = pool.submit(search)
        ingestion = pool.submit(
            ingest, rest(), MilvusStore(server.uri, "outage"), tokenizer, embedder, chunk_size=CHUNK
        )
        try:
            assert searched.wait(600) and reading.wait(600)
            server.stop()
            gone.set()
            time.sleep(30)
            assert not searches.done() and not ingestion.done()
            server.start()
            ingestion.result(timeout=600)
            retriever.retrieve(chunks)  # the collection is loaded again
        finally:
            ended.set()
        found = searches.result(timeout=600)
    assert rows_of(store) == expected_rows(documents, tokenizer)
    # The other half can only improve an answer: neighbors are never fewer or less similar.
    assert len(found) > 1 and all((scores >= before - 1e-5).all() for scores in found)


@pytest.fixture(scope="module")
def guarded(server_process, tmp_path_factory):
    """A server with TLS and passwords, and its certificate. The other one is stopped meanwhile."""
    server_process.stop()
    folder = tmp_path_factory.mktemp("guarded")
    key, certificate = str(folder / "key.pem"), str(folder / "certificate.pem")
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext {names}".split()
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    options = ["--authorization-enabled", "true", "--tls-mode", "1"]
    options += ["--server-pem-path", certificate, "--server-key-path", key]
    client = {"secure": True, "server_pem_path": certificate, "server_name": "localhost", "token": "root:Milvus"}
    guarded = MilvusServer(folder / "data", *options, scheme="https", **client)
    yield guarded, TLS(certificate, server_name="localhost")
    guarded.stop()


@pytest.mark.server
class TestGuardedServer:
    def test_the_token_and_certificate_are_accepted(self, guarded, documents, tokenizer, embedder, monkeypatch):
        server, tls = guarded
        monkeypatch.setenv("MILVUS_TOKEN", "root:Milvus")
        store = MilvusStore(MilvusAddress(server.uri, tls=tls), "c")
        ingest(documents[:2], store, tokenizer, embedder, chunk_size=CHUNK)
        assert rows_of(store) == expected_rows(documents[:2], tokenizer)
        assert "root" not in repr(store) + repr(store.connection)
        pickled = pickle.dumps(store)
        assert b"root:Milvus" not in pickled
        assert rows_of(pickle.loads(pickled)) == expected_rows(documents[:2], tokenizer)
        monkeypatch.delenv("MILVUS_TOKEN")
        with pytest.raises(KnowledgeBaseError, match=f"{server.uri}.* set MILVUS_TOKEN"):
            pickle.loads(pickled).count()

    @pytest.mark.parametrize("token", ["root:wrong", None])
    def test_a_wrong_or_missing_token_is_explained(self, guarded, token):
        server, tls = guarded
        with pytest.raises(KnowledgeBaseError, match="does not let this program in: check the token") as caught:
            MilvusConnection(MilvusAddress(server.uri, token=token, tls=tls, timeout=5))
        assert "wrong" not in str(caught.value)

    def test_a_missing_certificate_is_explained(self, guarded):
        uri = guarded[0].uri.replace("127.0.0.1", "localhost")  # not the channel of the tests above
        with pytest.raises(KnowledgeBaseError, match="https:// and which certificate"):
            MilvusConnection(MilvusAddress(uri, token="root:Milvus", timeout=5))

    def test_a_server_that_is_gone_is_named(self, guarded, documents, tokenizer, embedder):
        server, tls = guarded
        store = MilvusStore(MilvusAddress(server.uri, token="root:Milvus", tls=tls, timeout=4), "gone")
        ingest(documents[:2], store, tokenizer, embedder, chunk_size=CHUNK)
        retriever = MilvusRetriever(store, tokenizer, embedder)
        server.stop()
        started = time.monotonic()
        with pytest.raises(KnowledgeBaseError, match=f"{server.uri} did not answer .* for .*server up"):
            retriever.retrieve([[7] * CHUNK])
        assert time.monotonic() - started > 3  # it retried, at least until the last try within 4 s
        with pytest.raises(KnowledgeBaseError, match=f"{server.uri}: nothing answers there"):
            MilvusStore(MilvusAddress(server.uri, token="root:Milvus", tls=tls, timeout=4), "gone")

    def test_wrong_tls_files_are_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no TLS file"):
            TLS(str(tmp_path / "none.pem"))
        with pytest.raises(ValueError, match="both"):
            TLS(certificate=__file__)


def run_ingestion(uri, tokenizer, embedding, version, most_bytes=None):
    """Ingest a version of the documents.

    Args:
        most_bytes: size limit of a file, which looks like a full disk.
    """
    tokenizer, embedder = BulkTokenizer(AutoTokenizer.from_pretrained(tokenizer)), Embedder(embedding, device="cpu")
    store = MilvusStore(uri, "retro")
    print("ready", flush=True)
    if most_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    ingest(texts(version), store, tokenizer, embedder, chunk_size=CHUNK)
    store.close()
    print("done", flush=True)


def texts(version):
    """Return documents whose lengths change from version to version."""
    return [
        Document(f"d{i}", f"version {version} of {i} " + "word " * ((i * 7 + version * 13) % 90)) for i in range(1500)
    ]


def test_twenty_kills_at_random_points_lose_nothing(tmp_path, tokenizer, tokenizer_folder, embedding_folder, embedder):
    """Each run ingests another version of the documents and is killed, except the last one."""
    uri, moments = str(tmp_path / "kb.db"), random.Random(0)
    for version in range(20):
        arguments = uri, str(tokenizer_folder), str(embedding_folder), version
        process = Forked(tmp_path / f"{version}.log", run_ingestion, *arguments)
        process.wait_for_output("ready")
        time.sleep(moments.uniform(0.02, 1.5))
        process.kill()
        process.wait()
    store = MilvusStore(uri, "retro")
    ingest(texts(20), store, tokenizer, embedder, chunk_size=8)
    assert rows_of(store) == expected_rows(texts(20), tokenizer)
    assert store.count() == len(rows_of(store))
    store.close()


def write_on_and_on(uri, tokenizer, embedding):
    """Write documents without end, and print the number of each written one."""
    tokenizer, embedder = BulkTokenizer(AutoTokenizer.from_pretrained(tokenizer)), Embedder(embedding, device="cpu")
    store = MilvusStore(uri, "retro")
    ingest([], store, tokenizer, embedder, chunk_size=CHUNK)
    for i in range(10**6):
        chunks = [Chunk(f"d{i}", j, [1 + i % 9] * CHUNK, []) for j in range(20)]
        store.upsert(chunks, embedder.encode(["text"] * 20))
        print(i, flush=True)


def test_acknowledged_rows_survive_a_kill(tmp_path, tokenizer_folder, embedding_folder):
    uri = str(tmp_path / "kb.db")
    process = Forked(tmp_path / "log", write_on_and_on, uri, str(tokenizer_folder), str(embedding_folder))
    process.wait_for_output("\n119\n")
    process.kill()
    process.wait()
    last = int(process.output.rpartition("\n")[0].split()[-1])  # the last line may be half a number
    with contextlib.closing(MilvusStore.open(uri, "retro")) as store:
        there = {row["pk"] for row in store.scan(("pk",))}
        assert len(there) >= 20 * (last + 1)
        assert store.chunks_of([f"d{last}"]).keys() <= there and len(store.chunks_of([f"d{last}"])) == 20


def test_a_full_disk_loses_nothing(tmp_path, tokenizer, tokenizer_folder, embedding_folder, embedder):
    uri = str(tmp_path / "kb.db")
    store = MilvusStore(uri, "retro")
    ingest(texts(0)[:100], store, tokenizer, embedder, chunk_size=CHUNK)
    store.close()
    arguments = uri, str(tokenizer_folder), str(embedding_folder), 0
    process = Forked(tmp_path / "log", run_ingestion, *arguments, 20_000)
    assert process.wait() != 0
    assert "has no more disk space" in process.output and "run the same command again" in process.output
    store = MilvusStore.open(uri, "retro")
    assert {row[0] for row in rows_of(store)} >= {document.id for document in texts(0)[:100]}
    ingest(texts(0), store, tokenizer, embedder, chunk_size=CHUNK)
    assert rows_of(store) == expected_rows(texts(0), tokenizer)
    store.close()


class TestOneFileForSeveralProcesses:
    def test_the_first_process_serves_the_others_and_another_takes_over(
        self, tmp_path, tokenizer, tokenizer_folder, embedding_folder, embedder
    ):
        uri = str(tmp_path / "kb.db")
        serving = Forked(tmp_path / "serving.log", retrieval.cli.main, ["serve", "--uri", uri])
        serving.wait_for_output("is served at http://127.0.0.1:")
        store = MilvusStore(uri, "retro")
        assert not store.connection.owns_file
        arguments = uri, str(tokenizer_folder), str(embedding_folder), 3
        helper = Forked(tmp_path / "helper.log", run_ingestion, *arguments)  # two write at once, a third serves
        ingest(texts(3)[:700], store, tokenizer, embedder, chunk_size=8)
        assert helper.wait() == 0, helper.output
        assert rows_of(store) == expected_rows(texts(3), tokenizer)
        serving.send_signal(signal.SIGINT)
        assert serving.wait() == 0
        assert len(serving.output.splitlines()) == 2  # where it is served, and nothing of the libraries
        assert rows_of(store) == expected_rows(texts(3), tokenizer)  # this process has opened the file itself
        assert store.connection.owns_file
        store.close()
        assert not (tmp_path / "kb.db.served").exists()

    def test_a_process_that_is_ending_is_waited_for(self, tmp_path):
        connection = MilvusConnection(str(tmp_path / "kb.db"))
        ending = MilvusException(1, "MilvusLite is closed")
        assert not is_transient(ending, owns_file=connection.owns_file)  # its own file
        assert is_transient(ending, owns_file=False)  # another process's: the next attempt opens the file
        connection.close()

    def test_serve_names_the_process_that_serves_already(self, tmp_path):
        connection = MilvusConnection(str(tmp_path / "kb.db"))
        second = Forked(tmp_path / "log", retrieval.cli.main, ["serve", "--uri", connection.uri])
        assert second.wait() == 2 and f"already, at {connection.serving}" in second.output
        connection.close()

    def test_a_file_in_use_on_another_machine_is_refused(self, tmp_path):
        uri = str(tmp_path / "kb.db")
        connection = MilvusConnection(uri)
        notice = tmp_path / "kb.db.served"
        notice.write_text(json.dumps(json.loads(notice.read_text()) | {"host": "elsewhere"}))
        other = Forked(tmp_path / "log", MilvusConnection, uri)
        assert other.wait() == 1 and "in use by process" in other.output and "one machine only" in other.output
        connection.close()


def test_accelerate_launch_shares_an_ingestion(tmp_path, tokenizer, tokenizer_folder, embedding_folder):
    rows = [{"id": document.id, "text": document.text} for document in texts(1)[:400]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ingest_ = ["-m", "retrieval", "ingest", str(tmp_path / "rows.jsonl"), "--doc-id-field", "id"]
    models = ["--tokenizer", str(tokenizer_folder), "--embedding-model", str(embedding_folder), "--chunk-size", "8"]
    command = [*ACCELERATE, *ingest_, *models, "--uri", str(tmp_path / "kb.db")]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    assert "process 0 of 2" in result.stdout and "process 1 of 2" in result.stdout, result.stdout
    with contextlib.closing(MilvusStore.open(str(tmp_path / "kb.db"), "retro")) as store:
        expected = [Document(row["id"], row["text"]) for row in rows]
        assert rows_of(store) == expected_rows(expected, tokenizer)


def test_a_file_is_released_after_a_wrong_database(tmp_path):
    uri = str(tmp_path / "kb.db")
    with pytest.raises(KnowledgeBaseError, match="no database 'nope'"):
        MilvusConnection(MilvusAddress(uri, database="nope"))
    serving = Forked(tmp_path / "log", retrieval.cli.main, ["serve", "--uri", uri])
    serving.wait_for_output("is served at")
    serving.send_signal(signal.SIGINT)
    assert serving.wait() == 0
