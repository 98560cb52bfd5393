"""Folders as sources: the files that are read, and the names of their documents."""

import pytest

from retrieval import Document, read_documents
from retrieval.cli import main


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


def test_two_sources_with_the_same_name_are_refused(tmp_path, tokenizer_folder, embedding_folder, capsys):
    for name in ("a", "b"):
        (tmp_path / name / "texts").mkdir(parents=True)
        (tmp_path / name / "texts" / "README.md").write_text(f"from {name}")
    models = ["--tokenizer", str(tokenizer_folder), "--embedding-model", str(embedding_folder)]
    sources = [str(tmp_path / name / "texts") for name in ("a", "b")]
    with pytest.raises(SystemExit):
        main(["ingest", *sources, "--uri", str(tmp_path / "kb.db"), *models])
    assert "have the same name" in capsys.readouterr().err
