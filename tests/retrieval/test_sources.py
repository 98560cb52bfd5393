"""Every row of a source becomes a document with an id of its own, or is refused by its place."""

import datetime
import functools
import json
import sqlite3

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pytest
from datasets import Dataset

from data_retro.mixtures import DocumentStream, mix
from retrieval import Document, Source, documents_from_rows, read_documents
from retrieval.cli import main

from ..support.texts import ids_and_texts, write_lines


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dataset": ""}, "needs the name of its dataset, file or folder; it is ''"),
        ({"dataset": 7}, "it is 7"),
        ({"split": None}, "Data source 'rows': split is None. Give a text"),
        ({"text_field": ""}, "text_field is ''"),
        ({"doc_id_field": 3}, "doc_id_field is 3"),
        ({"metadata_fields": "year"}, "metadata_fields is 'year'. Give a list of names"),
        ({"metadata_fields": [1]}, r"metadata_fields is \[1\]"),
    ],
)
def test_a_source_checks_itself(settings, message):
    with pytest.raises(ValueError, match=message):
        Source(**{"dataset": "rows", **settings})


def test_several_sources_are_read_one_after_the_other(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    rows = write_lines(tmp_path / "b.jsonl", [{"key": 1, "body": "one", "year": 1999}])
    source = Source(str(rows), text_field="body", doc_id_field="key", metadata_fields=["year"])
    expected = [
        Document("a.txt", "a text", {"source": "a.txt"}),
        Document("1", "one", {"source": "b.jsonl", "year": 1999}),
    ]
    assert list(read_documents(tmp_path / "a.txt", source)) == expected


class TestIds:
    """Two different rows never become one document."""

    @pytest.mark.parametrize(
        "value",
        [
            None,
            float("nan"),
            7.0,
            True,
            "",
            " \n",
            [1],
            {"a": 1},
            b"7",
            pd.NaT,
            pd.NA,
            np.float64(7),
            datetime.date(2024, 1, 2),
        ],
        ids=repr,
    )
    def test_an_invalid_id_is_refused_with_its_row(self, value):
        rows = [{"key": "a", "text": "one"}, {"key": value, "text": "two"}]
        documents = documents_from_rows(rows, Source("rows", doc_id_field="key"))
        assert next(documents).id == "a"
        with pytest.raises(ValueError, match="Row 1 of rows: the id, field 'key', is "):
            next(documents)

    def test_a_null_id_is_refused_in_every_format(self, tmp_path):
        rows = [{"key": "a", "text": "one"}, {"key": None, "text": "two"}, {"key": None, "text": "three"}]
        write_lines(tmp_path / "rows.jsonl", rows)
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        (tmp_path / "rows.csv").write_text("key,text\na,one\n,two\n,three\n")
        Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
        pa.feather.write_feather(pa.Table.from_pylist(rows), str(tmp_path / "rows.feather"))
        for path in sorted(tmp_path.iterdir()):
            with pytest.raises(ValueError, match=f"Row 1 of {path.name}: the id"):
                ids_and_texts(path, doc_id_field="key")
            assert [text for _, text in ids_and_texts(path)] == ["one", "two", "three"]

    def test_an_id_that_is_a_whole_number_becomes_its_digits(self, tmp_path):
        Dataset.from_list([{"key": key, "text": str(key)} for key in (7, -1, 2**62)]).to_parquet(tmp_path / "r.parquet")
        assert ids_and_texts(tmp_path / "r.parquet", doc_id_field="key") == [(str(k), str(k)) for k in (7, -1, 2**62)]
        (document,) = documents_from_rows([{"key": np.int64(7), "text": "a"}], Source("rows", doc_id_field="key"))
        assert document.id == "7"
        (tmp_path / "rows.csv").write_text("key,text\n007,a\n7,b\nNaN,c\nNone,d\n")  # a CSV file has only text
        assert [id_ for id_, _ in ids_and_texts(tmp_path / "rows.csv", doc_id_field="key")] == [
            "007",
            "7",
            "NaN",
            "None",
        ]

    @pytest.mark.parametrize("second", ["7", 7])
    def test_two_rows_of_one_id_and_different_texts_are_both_named(self, tmp_path, second):
        rows = [{"key": 7, "text": "one"}, {"key": 8, "text": "two"}, {"key": second, "text": "three"}]
        path = write_lines(tmp_path / "rows.jsonl", rows)
        with pytest.raises(
            ValueError, match="Row 0 of rows.jsonl and Row 2 of rows.jsonl have the same id, '7', and differ"
        ):
            ids_and_texts(path, doc_id_field="key")
        write_lines(path, rows[:2])
        other = write_lines(tmp_path / "other.jsonl", [{"key": 9, "text": "nine"}, {"key": 8, "text": "other"}])
        with pytest.raises(ValueError, match="Row 1 of rows.jsonl and Row 1 of other.jsonl"):
            list(read_documents(*(Source(str(file), doc_id_field="key") for file in (path, other))))

    def test_two_rows_of_one_id_and_different_metadata_are_refused(self):
        rows = [{"key": 7, "text": "one", "year": year} for year in (1, 2)]
        with pytest.raises(ValueError, match="have the same id"):
            list(documents_from_rows(rows, Source("rows", doc_id_field="key", metadata_fields=["year"])))

    def test_repeated_rows_are_left_out_and_counted(self, caplog):
        rows = [{"key": i % 3, "text": f"text {i % 3}"} for i in range(9)]
        assert [d.id for d in documents_from_rows(rows, Source("rows", doc_id_field="key"))] == ["0", "1", "2"]
        assert "Left out 6 rows" in caplog.text

    def test_a_mixture_may_repeat_an_id(self, tmp_path):
        path = write_lines(tmp_path / "rows.jsonl", [{"key": 1, "text": "one"}, {"key": 1, "text": "two"}])
        assert [d.text for d in mix([DocumentStream(str(path), doc_id_field="key")])] == ["one", "two"]
        write_lines(path, [{"key": None, "text": "one"}])
        with pytest.raises(ValueError, match="Row 0 of rows.jsonl: the id"):
            list(mix([DocumentStream(str(path), doc_id_field="key")]))

    def test_no_field_name_has_a_special_meaning(self, tmp_path):
        fields = {"__file_id__": "other.txt", "__row_id__": "other#9"}
        path = write_lines(tmp_path / "rows.jsonl", [{"text": "one", **fields}, {"text": 5, **fields}])
        for source, name in ((path, "rows.jsonl"), (tmp_path, f"{tmp_path.name}/rows.jsonl")):
            documents = read_documents(str(source))
            assert next(documents).id == f"{name}#0"
            with pytest.raises(ValueError, match=f"Row 1 of {name}: field 'text' is 5, not text"):
                next(documents)

    def test_a_full_temporary_folder_is_named(self, monkeypatch):
        class Full(sqlite3.Connection):
            def executescript(self, script):
                super().executescript(f"{script} PRAGMA max_page_count = 3;")

        monkeypatch.setattr("retrieval.sources.sqlite3.connect", functools.partial(sqlite3.connect, factory=Full))
        rows = ({"text": f"text {i}"} for i in range(10_000))
        with pytest.raises(OSError, match="disk is full.*SQLITE_TMPDIR or TMPDIR"):
            list(documents_from_rows(rows, "rows"))

    def test_an_id_that_is_too_long_is_refused_with_its_row(self):
        with pytest.raises(ValueError, match="Row 0 of rows: The document id 'xxx.* longer than 4096 bytes"):
            list(documents_from_rows([{"key": "x" * 5000, "text": "a"}], Source("rows", doc_id_field="key")))


class TestTextAndMetadata:
    @pytest.mark.parametrize("value", [None, float("nan"), 5, True, ["a"], {"a": "b"}, b"bytes", pd.NaT])
    def test_a_text_of_another_type_is_refused_with_its_row(self, value):
        with pytest.raises(ValueError, match="Row 1 of rows: field 'text' is .*, not text"):
            list(documents_from_rows([{"text": "a"}, {"text": value}], "rows"))

    def test_a_lone_surrogate_is_refused_with_its_row(self, tmp_path):
        (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n{"text": "\\ud800"}\n')
        with pytest.raises(ValueError, match="Row 1 of rows.jsonl: .*lone surrogate"):
            ids_and_texts(tmp_path / "rows.jsonl")

    @pytest.mark.parametrize(
        "value", [None, float("nan"), pd.NaT, pd.NA, np.float32("nan"), np.datetime64("NaT")], ids=repr
    )
    def test_missing_metadata_is_left_out(self, value):
        (document,) = documents_from_rows([{"text": "a", "year": value}], Source("rows", metadata_fields=["year"]))
        assert document.metadata == {"source": "rows"}

    @pytest.mark.parametrize(
        "value, stored",
        [
            (np.int64(5), 5),
            (np.float32(0.5), 0.5),
            (np.bool_(True), True),
            (pd.Timestamp("2024-01-02"), "2024-01-02T00:00:00"),
        ],
    )
    def test_metadata_of_other_libraries_is_converted(self, value, stored):
        (document,) = documents_from_rows([{"text": "a", "field": value}], Source("rows", metadata_fields=["field"]))
        assert document.metadata == {"source": "rows", "field": stored}
        assert type(document.metadata["field"]) is type(stored)

    @pytest.mark.parametrize(
        "value", [[1], {"a": 1}, float("inf"), "x" * 5000, b"bytes", 2**70], ids=lambda v: type(v).__name__
    )
    def test_metadata_that_cannot_be_stored_is_refused_with_its_row(self, value):
        with pytest.raises(ValueError, match="Row 1 of rows: Metadata field 'year'"):
            rows = [{"text": "a", "year": 1}, {"text": "b", "year": value}]
            list(documents_from_rows(rows, Source("rows", metadata_fields=["year"])))


class TestIngest:
    """An ingestion that reads nothing fails before it loads a model or creates a collection."""

    @pytest.mark.parametrize("content", ["nothing", "hidden", "binary", "empty", "no rows"])
    def test_an_ingestion_without_text_fails(self, tmp_path, capsys, content):
        folder = tmp_path / "texts"
        folder.mkdir()
        name, data = {
            "nothing": (".x", b"a"),
            "hidden": (".hidden.txt", b"text"),
            "binary": ("a.bin", b"\0\1"),
            "empty": ("a.txt", b""),
            "no rows": ("rows.csv", b"key,text\n"),
        }[content]
        (folder / name).write_bytes(data)
        with pytest.raises(SystemExit) as exit_:
            main(["ingest", str(folder), "--uri", str(tmp_path / "kb.db"), "--tokenizer", "no/such"])
        assert exit_.value.code == 2
        assert "error: Nothing was read: there is no text in" in capsys.readouterr().err
        assert not (tmp_path / "kb.db").exists()

    def test_an_empty_source_beside_another_is_logged(self, tmp_path, caplog):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        (tmp_path / "b" / "x.txt").write_text("x")
        assert len(list(read_documents(tmp_path / "a", tmp_path / "b"))) == 1
        assert f"{tmp_path / 'a'} holds no document" in caplog.text


def test_two_sources_with_the_same_name_are_refused(tmp_path, tokenizer_folder, embedding_folder, capsys):
    for name in ("a", "b"):
        (tmp_path / name / "texts").mkdir(parents=True)
        (tmp_path / name / "texts" / "README.md").write_text(f"from {name}")
    models = ["--tokenizer", str(tokenizer_folder), "--embedding-model", str(embedding_folder)]
    sources = [str(tmp_path / name / "texts") for name in ("a", "b")]
    with pytest.raises(SystemExit):
        main(["ingest", *sources, "--uri", str(tmp_path / "kb.db"), *models])
    assert "have the same name" in capsys.readouterr().err
