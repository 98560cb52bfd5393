"""Files are read in every format, encoding and compression; folders are read without loops."""

import bz2
import csv
import datetime
import gzip
import json
import lzma
import os

import pyarrow as pa
import pyarrow.feather
import pytest
from datasets import Dataset, DatasetDict

from data_retro.mixtures import DocumentStream, mix
from retrieval import Document, Source, read_documents

from ..support.texts import ids_and_texts, write_lines

TEXTS = ["Äpfel und Birnen", "漢字 and\ttabs", 'a "quoted" word,\nand a line', "plain"]
# In a .tsv file a quote is a character like any other.
TABLE_TEXTS = [TEXTS[0], '"Quoted," he said, "', '""', '"whole"']

COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
COMPRESS[".zst"] = lambda data: pa.compress(data, codec="zstd", asbytes=True)


class TestFiles:
    @pytest.mark.parametrize("compression", COMPRESS)
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
    def test_every_encoding_and_compression_is_read(self, tmp_path, encoding, compression):
        """A file is read alone and in a folder, for training and for a knowledge base."""
        table = "".join(f'{i},"{text.replace(chr(34), chr(34) * 2)}"\n' for i, text in enumerate(TEXTS))
        lines = "".join(json.dumps({"key": i, "text": text}, ensure_ascii=False) + "\n" for i, text in enumerate(TEXTS))
        rows = [{"key": i, "text": text} for i, text in enumerate(TEXTS)]
        files = {
            "a.txt": TEXTS[2],
            "b.jsonl": lines,
            "c.ndjson": lines,
            "d.json": json.dumps(rows, ensure_ascii=False, indent=1),
            "e.csv": f"key,text\n{table}",
            "F.TSV": "key\ttext\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(TABLE_TEXTS)),
        }
        folder = tmp_path / "texts"
        folder.mkdir()
        for name, text in files.items():
            (folder / f"{name}{compression}").write_bytes(COMPRESS[compression](text.encode(encoding)))
        expected = {}
        for name in files:
            full = f"{name}{compression}"
            texts = TABLE_TEXTS if name == "F.TSV" else TEXTS
            expected[full] = (
                [(full, TEXTS[2])] if name == "a.txt" else [(f"{full}#{i}", t) for i, t in enumerate(texts)]
            )
            assert ids_and_texts(folder / full) == expected[full]
            assert [(d.id, d.text) for d in mix([DocumentStream(str(folder / full))])] == expected[full]
        assert ids_and_texts(folder) == [
            (f"texts/{id_}", text) for name in sorted(expected) for id_, text in expected[name]
        ]

    def test_a_file_of_several_compressed_parts_is_read_whole(self, tmp_path):
        for suffix, compress in COMPRESS.items():
            path = tmp_path / f"a.txt{suffix}"
            path.write_bytes(compress(b"one ") + compress(b"two"))
            assert ids_and_texts(path) == [(path.name, "one two")]

    @pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
    def test_a_damaged_file_is_named(self, tmp_path, compression, name):
        line = b'{"text": "%d"}\n' if name.endswith("jsonl") else b"%d\n"
        whole = b"text\n" * name.endswith("csv") + b"".join(line % i for i in range(9999))
        path = tmp_path / f"{name}{compression}"
        for damaged in (COMPRESS[compression](whole)[:-9], whole):
            path.write_bytes(damaged)
            with pytest.raises(
                ValueError, match=f"Cannot read .*{name}{compression}: it is damaged, or not compressed"
            ):
                ids_and_texts(path)

    def test_other_encodings_are_refused_and_not_guessed(self, tmp_path, caplog):
        (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
        (tmp_path / "b.jsonl").write_bytes('{"text": "naïve"}'.encode("latin-1"))
        (tmp_path / "c.txt").write_bytes("no mark".encode("utf-16-le"))
        for name in ("a.txt", "b.jsonl", "c.txt"):
            with pytest.raises(ValueError, match=f"{name}: it is not UTF-8 text"):
                ids_and_texts(tmp_path / name)
        (tmp_path / "b.jsonl").unlink()
        (tmp_path / "d.txt").write_text("good")
        assert [text for _, text in ids_and_texts(tmp_path)] == ["good"]
        assert "a.txt: it is not UTF-8" in caplog.text and "c.txt: it is not UTF-8" in caplog.text

    def test_parquet_and_arrow_files_are_read(self, tmp_path):
        rows = [{"key": f"k{i}", "text": f"text {i}", "day": datetime.date(2024, 1, 1 + i)} for i in range(20)]
        table = pa.Table.from_pylist(rows)
        Dataset.from_list(rows).to_parquet(tmp_path / "odd [1]*?.parquet")
        pa.feather.write_feather(table, str(tmp_path / "a.feather"), compression="zstd")
        with pa.ipc.new_stream(str(tmp_path / "b.arrow"), table.schema) as stream:
            stream.write_table(table, max_chunksize=7)
        with pa.ipc.new_file(str(tmp_path / "c.ARROW"), table.schema) as file:
            file.write_table(table)
        for path in tmp_path.iterdir():
            assert ids_and_texts(path) == [(f"{path.name}#{i}", row["text"]) for i, row in enumerate(rows)]
            documents = list(read_documents(Source(str(path), doc_id_field="key", metadata_fields=["day"])))
            assert documents[3] == Document("k3", "text 3", {"source": path.name, "day": "2024-01-04"})
            path.write_bytes(path.read_bytes()[:90])
            with pytest.raises(ValueError, match="Cannot read .*: it is damaged"):
                ids_and_texts(path)
        (tmp_path / "x.parquet.gz").write_bytes(b"")
        with pytest.raises(ValueError, match="Decompress it first"):
            ids_and_texts(tmp_path / "x.parquet.gz")

    def test_json_files_are_read_as_lists_lines_and_objects(self, tmp_path):
        path = tmp_path / "rows.json"
        for content, texts in (
            ('[{"text": "a"}, {"text": "b"}]', ["a", "b"]),
            ('{"text": "a"}\n\n{"text": "b"}\n', ["a", "b"]),
            ('{"text": "a"}', ["a"]),
            ('{\n "text": "a"\n}\n', ["a"]),
            ("[]", []),
        ):
            path.write_text(content)
            assert [text for _, text in ids_and_texts(path)] == texts
        for content, message in (
            ('[{"text": "a"}, 5]', "item 1: expected an object"),
            ('[{"text": "a"}', "rows.json: not JSON"),
            ('{"text": "a"}\n{"text": ', "rows.json, line 2: not JSON"),
            ("[" * 100_000, "not JSON"),
            ("", "not JSON"),
        ):
            path.write_text(content)
            with pytest.raises(ValueError, match=message):
                ids_and_texts(path)

    @pytest.mark.parametrize(
        "content, message",
        [
            ("text,text\na,b\n", "two columns have the same name"),
            ("key,text\n1,a\n2,b,c\n", "line 3: 3 cells, but 2 columns"),
            ("key,text\n1\n", "line 2: 1 cells, but 2 columns"),
            ('key,text\n1,"a" b\n', "line 2: .* Put cells that contain .* into double quotes"),
            ('key,text\n1,"a\n2,b\n', "unexpected end of data.* Put cells that contain .* into double quotes"),
            ("key;text\n1;a\n", "Row 0 of rows.csv has no field 'text'; it has 'key;text'"),
        ],
    )
    def test_a_malformed_table_is_refused_with_its_line(self, tmp_path, content, message):
        (tmp_path / "rows.csv").write_text(content)
        with pytest.raises(ValueError, match=message):
            ids_and_texts(tmp_path / "rows.csv")

    def test_a_table_is_read_as_the_csv_module_wrote_it(self, tmp_path):
        texts = [*TEXTS, "\r\n\r\n", "long " * 100_000, "'", '"', "end\\"]
        with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["text"], *([text] for text in texts)])
        assert [text for _, text in ids_and_texts(tmp_path / "rows.csv")] == texts

    def test_files_without_a_text_field_are_texts_in_a_folder(self, tmp_path, caplog):
        """A program's folder holds tables and settings, which are texts like its sources."""
        contents = {
            "a.json": '{\n "name": "package"\n}\n',
            "b.csv": "x,y\n1,2\n",
            "c.json": "// a comment\n{}",
            "d.json": '{"text": "a row"}',
            "e.tsv": 'prose\t"with" a quote\nand\tmore',
        }
        for name, content in contents.items():
            (tmp_path / name).write_text(content)
        contents["d.json"] = "a row"
        ids = [f"{tmp_path.name}/{name}" + "#0" * (name == "d.json") for name in contents]
        assert ids_and_texts(tmp_path) == list(zip(ids, contents.values(), strict=True))
        assert all(f"{name} as one text" in caplog.text for name in contents if name != "d.json")


class TestFolders:
    def test_links_are_followed_and_loops_end(self, tmp_path, caplog):
        root, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
        for folder in (root / "inner", root / ".hidden", elsewhere / "deep"):
            folder.mkdir(parents=True)
        (root / "inner" / "a.txt").write_text("inner")
        (root / ".hidden" / "h.txt").write_text("hidden")
        (elsewhere / "deep" / "b.txt").write_text("elsewhere")
        (root / "more").symlink_to(elsewhere)
        (root / "file.txt").symlink_to(elsewhere / "deep" / "b.txt")
        (root / "shown").symlink_to(root / ".hidden")
        (root / "an_alias").symlink_to(root / "inner")  # comes first, and must not take the ids of what it leads to
        (root / "again").symlink_to(root)
        (elsewhere / "back").symlink_to(root)
        (elsewhere / "up").symlink_to(tmp_path)
        (root / "self").symlink_to(root / "self")
        (root / "broken").symlink_to(tmp_path / "nowhere")
        assert ids_and_texts(root) == [
            ("texts/file.txt", "elsewhere"),
            ("texts/inner/a.txt", "inner"),
            ("texts/more/deep/b.txt", "elsewhere"),
            ("texts/shown/h.txt", "hidden"),
        ]
        for name in ("self", "broken"):
            assert f"{name}: it is a broken link" in caplog.text
        for name in ("an_alias", "again", "back"):
            assert f"{name}: it leads to" in caplog.text and "which is read already" in caplog.text
        with pytest.raises(FileNotFoundError, match="broken link"):
            ids_and_texts(root / "broken")

    def test_files_with_odd_names_are_read(self, tmp_path):
        root = tmp_path / "texts"
        root.mkdir()
        names = ["-x.txt", "no suffix", "a\nb.txt", "~", "# 1", "%41", "[a]*?.jsonl", "漢字.TXT", "x.txt#0", "a\\b"]
        for name in names:
            (root / name).write_text('{"text": "t"}' if name.endswith("jsonl") else "t")
        with open(os.fsencode(root) + b"/caf\xe9.txt", "w") as file:
            file.write("Latin")
        expected = {f"texts/{name}" + "#0" * name.endswith("jsonl") for name in names} | {"texts/caf\\xe9.txt"}
        assert {id_ for id_, _ in ids_and_texts(root)} == expected
        assert ids_and_texts(os.fsdecode(os.fsencode(root) + b"/caf\xe9.txt")) == [("caf\\xe9.txt", "Latin")]

    def test_a_pipe_is_skipped_without_waiting(self, tmp_path, caplog):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "a.txt").write_text("a")
        assert len(ids_and_texts(tmp_path)) == 1
        assert "pipe: it is not a regular file" in caplog.text
        with pytest.raises(ValueError, match="not a regular file"):
            ids_and_texts(tmp_path / "pipe")

    def test_a_dataset_saved_to_disk_is_read_as_its_rows(self, tmp_path, caplog):
        dataset = Dataset.from_list([{"text": "one"}, {"text": "two"}])
        DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "saved"))
        (tmp_path / "saved" / "train" / "other.json").write_text("{}")
        (tmp_path / "state.json").write_text("a text like any other")
        assert [text for _, text in ids_and_texts(tmp_path)] == ["one", "two", "{}", "a text like any other"]
        for name in ("dataset_dict.json", "train/dataset_info.json", "train/state.json"):
            assert f"Skipped {tmp_path}/saved/{name}: it describes the dataset" in caplog.text

    def test_many_unreadable_files_are_counted(self, tmp_path, caplog):
        for i in range(50):
            (tmp_path / f"{i:02}.bin").write_bytes(b"\0")
        assert ids_and_texts(tmp_path) == []
        assert caplog.text.count(".bin: it is not UTF-8 text") == 20 and "Skipped 30 more files" in caplog.text

    def test_ids_in_a_folder_stay_as_they_were(self, tmp_path):
        root = tmp_path / "kb"
        (root / "sub" / "a").mkdir(parents=True)
        (root / "sub" / "a" / "x.txt").write_text("1")
        (root / "sub" / "a.txt").write_text("2")
        write_lines(root / "r.jsonl", [{"text": "3"}, {"text": "4"}])
        Dataset.from_list([{"text": "5"}]).to_parquet(root / "z.parquet")
        ids = ["kb/r.jsonl#0", "kb/r.jsonl#1", "kb/sub/a/x.txt", "kb/sub/a.txt", "kb/z.parquet#0"]
        assert [id_ for id_, _ in ids_and_texts(root)] == ids


def test_text_is_read_as_it_is_and_binary_files_are_left_out(tmp_path, caplog):
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
