"""A good run prints only its own progress and result; errors of other programs stay visible."""

import logging
import re
import subprocess
import sys

import grpc
import pytest
from pymilvus import MilvusClient, MilvusException

import generate_hf
import retrieval.cli
import train_hf
from retrieval import KnowledgeBaseError, MilvusStore

# Without any set-up of logging, as in a user's first script; then each command in the same process.
PROGRAM = """
import logging, sys
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # if it is installed, it logs what its kernels need
from transformers import AutoTokenizer
from retrieval import *
folder, tokenizer, embedding = sys.argv[1:]
name = AutoTokenizer.from_pretrained(tokenizer)
bulk, embedder = BulkTokenizer(name), Embedder(embedding, device="cpu")
uri = folder + "/library.db"
documents = [Document(f"d{i}", "a text that is long enough for a chunk or two " * 3) for i in range(20)]
store = MilvusStore(uri, "retro")
for _ in range(2):
    ingest(documents, store, bulk, embedder, chunk_size=8)
second = MilvusRetriever.from_uri(uri, tokenizer=name, embedding_model=embedding, device="cpu")
assert second.retrieve([[5] * 8], exclude_doc_ids=[["d0"]]).doc_ids[0][0]
store.reindex(IndexSettings.parse("HNSW"))
store.create(store.identity())  # as by two ingestions that start at once
assert second.retrieve([[5] * 8]).doc_ids[0][0] and store.delete_documents(["d1"]) and store.health()
export_knowledge_base(store, folder + "/library-export", bulk)
try:
    store.connection.describe_collection("none")
except KnowledgeBaseError:
    pass
store.close()
second.close()
print("LIBRARY", flush=True)
print("LIBRARY", file=sys.stderr, flush=True)
from retrieval.cli import main
place = ["--uri", folder + "/kb.db/"]
models = ["--tokenizer", tokenizer, "--embedding-model", embedding]
for _ in range(2):
    main(["ingest", folder + "/a.txt", *place, *models, "--chunk-size", "8"])
main(["search", "a text", *place, *models])
main(["info", *place])
main(["index", "HNSW", *place])
main(["export", folder + "/export", *place, "--tokenizer", tokenizer])
main(["import", folder + "/export", "--uri", folder + "/other.db"])
main(["delete", "a.txt", *place])
"""


def test_the_library_and_the_commands_print_nothing_from_other_libraries(
    tmp_path, tokenizer_folder, embedding_folder, monkeypatch
):
    for name in ("GRPC_VERBOSITY", "TOKENIZERS_PARALLELISM", "PYTHONWARNINGS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "a.txt").write_text("a text that is long enough for a chunk or two")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(tokenizer_folder), str(embedding_folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    library, commands = result.stdout.split("LIBRARY\n")
    assert not library and "chunks unchanged" in commands and "a.txt, chunk 0" in commands
    lines = [line.strip() for line in re.split(r"[\r\n]|\x1b\[A", result.stderr) if line.strip()]
    bars = lines[lines.index("LIBRARY") + 1 :]
    assert lines.index("LIBRARY") == 0, result.stderr  # nothing before it
    assert bars and all(re.match(r"(ingest|export|import): .*chunk", bar) for bar in bars), result.stderr


def test_errors_of_another_user_of_pymilvus_are_still_logged(tmp_path, caplog):
    store = MilvusStore(tmp_path / "kb.db", "retro")
    with caplog.at_level(logging.WARNING):
        with pytest.raises(KnowledgeBaseError):
            store.connection.describe_collection("c")
        assert not caplog.records
        other = MilvusClient(store.connection.serving, dedicated=True)
        with pytest.raises(MilvusException):
            other.describe_collection("none")
        assert [record.name for record in caplog.records] == ["pymilvus.decorators"]
    other.close()
    store.close()


def test_no_more_pings_than_the_server_permits(place, monkeypatch):
    """gRPC's servers and Milvus Lite permit one in 5 minutes; Milvus permits one in 5 seconds."""
    made = []
    real = grpc.insecure_channel

    def channel(target, options=None, **more):
        made.append(dict(options))
        return real(target, options=options, **more)

    monkeypatch.setattr(grpc, "insecure_channel", channel)
    store = place.store()
    MilvusStore(store.connection.serving, "c").close()  # by its address, as another process may name it
    last = (made[0], made[-1])
    if place.is_lite:
        assert all(options["grpc.keepalive_time_ms"] > 300_000 for options in last)
    else:
        assert all(options["grpc.keepalive_time_ms"] >= 5_000 for options in last)


@pytest.mark.parametrize("main", [retrieval.cli.main, train_hf.main, generate_hf.main])
def test_no_program_logs_missing_kernels(main, monkeypatch, capsys):
    logger = logging.getLogger("bitsandbytes")
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert logger.level == logging.ERROR
