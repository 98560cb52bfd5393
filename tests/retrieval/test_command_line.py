"""The options of the command line reach the library, and those of a source are declared once."""

import dataclasses

import pyarrow.parquet
import pytest
from datasets import Dataset
from transformers import HfArgumentParser

from configuration_retro import RetroConfig
from retrieval import IndexSettings, MilvusStore, Source
from retrieval.arguments import KnowledgeBaseArguments
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


class TestSearch:
    """--search and --analyzer."""

    @pytest.fixture
    def texts(self, tmp_path):
        write_lines(tmp_path / "rows.jsonl", [{"text": f"def readFile{i}(path): return {i}"} for i in range(3)])
        return str(tmp_path / "rows.jsonl")

    @pytest.fixture
    def place(self, tmp_path):
        return ["--uri", str(tmp_path / "kb.db")]

    @pytest.fixture
    def words(self, place, tokenizer_folder):
        return [*place, "--tokenizer", str(tokenizer_folder)]

    def test_words_need_no_embedding_model(self, texts, place, words, capsys):
        main(["ingest", texts, *words, "--search", "bm25", "--analyzer", "code"])
        main(["ingest", texts, *words])  # follows the collection
        capsys.readouterr()
        main(["search", "read_file1", *words, "-k", "1"])
        assert "1(path): return 1" in capsys.readouterr().out
        main(["info", *place])
        shown = " ".join(capsys.readouterr().out.split())
        assert 'search bm25 analyzer {"type": "code"}' in shown and "index of words SPARSE_INVERTED_INDEX" in shown
        assert "embedding" not in shown

    def test_a_hybrid_collection_is_searched_in_each_way(self, texts, place, words, models, capsys):
        main(["ingest", texts, *place, *models, "--search", "hybrid"])
        for search, used in (("dense", models), ("hybrid", models), ("bm25", words)):
            capsys.readouterr()
            main(["search", "readFile1", *place, *used, "--search", search, "-k", "1"])
            assert "chunk 0" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "options, message",
        [
            (["--search", "bm25", "--embedding-model", "x"], "'x' is given, but search 'bm25' uses none"),
            (["--search", "dense", "--analyzer", "code"], "search 'dense' looks at no words"),
            (["--analyzer", "code"], "search 'dense' looks at no words"),
            (["--search", "bm25", "--analyzer", "english"], "Milvus Lite does not know the tokenizer or type"),
            (["--search", "bm25", "--analyzer", "klingon"], "There is no analyzer 'klingon'. Use one of standard"),
            (["--search", "bm25", "--index", "HNSW"], "has no vectors, as it is searched by words"),
            (["--search", "both"], "invalid choice: 'both'"),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, texts, words, options, message, capsys):
        with pytest.raises(SystemExit):
            main(["ingest", texts, *words, *options])
        assert message in capsys.readouterr().err

    def test_a_search_that_the_collection_is_not_for(self, texts, words, capsys):
        main(["ingest", texts, *words, "--search", "bm25"])
        for options, message in (
            (["--search", "dense"], "was built for search 'bm25', and 'dense' is asked for"),
            (["--embedding-model", "x"], "'x' is given, but search 'bm25' uses none"),
        ):
            with pytest.raises(SystemExit):
                main(["search", "text", *words, *options])
            assert message in capsys.readouterr().err

    def test_programs_take_it_from_their_own_settings(self, texts, words, tmp_path, tokenizer):
        main(["ingest", texts, *words, "--search", "bm25"])
        parser = HfArgumentParser(KnowledgeBaseArguments)
        (settings,) = parser.parse_args_into_dataclasses(
            ["--knowledge_base", str(tmp_path / "kb.db"), "--search", "bm25"]
        )
        retriever = settings.open_retriever(tokenizer, num_neighbors=1)
        assert (retriever.search, retriever.embedder) == ("bm25", None)
        retriever.close()
