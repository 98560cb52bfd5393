"""The options of the command line reach the library, and those of a source are declared once."""

import dataclasses

import pyarrow.parquet
import pytest
from datasets import Dataset

from configuration_retro import RetroConfig
from retrieval import IndexSettings, MilvusStore, Source
from retrieval.chunking import CHUNK_SIZE
from retrieval.cli import build_parser, main
from retrieval.retriever import NUM_NEIGHBORS

from ..support.texts import write_lines


@pytest.fixture
def models(tokenizer_folder, embedding_folder):
    return ["--tokenizer", str(tokenizer_folder), "--embedding-model", str(embedding_folder), "--device", "cpu"]


@pytest.fixture
def ingest(tmp_path, models):
    """Ingest three rows with the given options into tmp_path / "kb.db"."""
    rows = [{"key": f"k{i}", "body": f"text number {i} " * 10, "year": 2000 + i} for i in range(3)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    command = ["ingest", str(path), "--text-field", "body", "--doc-id-field", "key", "--metadata-fields", "year"]
    command += [*models, "--chunk-size", "8", "--batch-size", "4"]
    return lambda *options: main([*command, *options])


def test_a_source_has_the_same_defaults_and_help_on_the_command_line(capsys):
    arguments = build_parser().parse_args(["ingest", "texts"])
    for field in dataclasses.fields(Source)[1:]:
        assert getattr(arguments, field.name) == field.default, field.name
    with pytest.raises(SystemExit):
        main(["ingest", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(field.metadata["help"] in shown for field in dataclasses.fields(Source)[1:])


def test_a_knowledge_base_has_the_model_s_defaults():
    config = RetroConfig()
    assert (config.chunk_size, config.num_neighbors) == (CHUNK_SIZE, NUM_NEIGHBORS)


def test_options_of_rows_and_of_the_collection_are_used(ingest, models, tmp_path, capsys):
    place = ["--uri", str(tmp_path / "kb.db"), "--collection-name", "rows", "--timeout", "60"]
    ingest(*place, "--index", "HNSW:M=8", "--expected-chunks", "10")
    capsys.readouterr()
    main(["search", "text number", "--filter", '{"year": 2001}', "-k", "5", *models, *place])
    found = capsys.readouterr().out
    assert "k1, chunk 0" in found and "k0" not in found and "k2" not in found
    store = MilvusStore.open(str(tmp_path / "kb.db"), "rows")
    assert store.index() == IndexSettings.parse("HNSW:M=8")
    store.close()


def test_a_vector_type_that_milvus_lite_lacks_is_refused(ingest, tmp_path, capsys):
    with pytest.raises(SystemExit):
        ingest("--uri", str(tmp_path / "kb.db"), "--vector-dtype", "float16")
    assert "float16 vectors need a Milvus server" in capsys.readouterr().err


def test_bulk_files_hold_the_rows_and_nothing_is_inserted(ingest, tmp_path):
    pytest.importorskip("pymilvus.bulk_writer")
    ingest("--bulk-files", str(tmp_path / "bulk"))
    files = list((tmp_path / "bulk").rglob("*.parquet"))
    ids = {row["doc_id"] for file in files for row in pyarrow.parquet.read_table(file).to_pylist()}
    assert ids == {"k0", "k1", "k2"} and not (tmp_path / "kb.db").exists()


def test_subset_and_split_choose_the_part_of_a_dataset(tmp_path, monkeypatch, capsys):
    asked = []

    def load(name, subset, *, split, streaming):
        asked.append((name, subset, split))
        return Dataset.from_list([{"text": ""}])

    monkeypatch.setattr("retrieval.sources.load_dataset", load)
    with pytest.raises(SystemExit):  # there is no text, so that no model is loaded
        main(
            [
                "ingest",
                "org/data",
                "--subset",
                "en",
                "--split",
                "test",
                "--uri",
                str(tmp_path / "kb"),
                "--tokenizer",
                "t",
            ]
        )
    assert asked == [("org/data", "en", "test")]
    assert "there is no text in org/data" in capsys.readouterr().err


def test_a_wrong_new_collection_is_refused_before_anything_is_made(tmp_path, capsys):
    for command in (["ingest", str(tmp_path), "--tokenizer", "none"], ["import", str(tmp_path)]):
        with pytest.raises(SystemExit):
            main([*command, "--uri", str(tmp_path / "kb.db"), "--expected-chunks", "0"])
        assert "expected_chunks is 0; it must be 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "kb.db").exists()
