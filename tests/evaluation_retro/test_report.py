"""Intervals cover what they should, and a report holds the same numbers in every form."""

import builtins
import json
import math

import numpy as np
import pytest

from evaluation_retro.report import Report
from evaluation_retro.statistics import Gain, bits_per_byte, gain


def test_bits_per_byte_of_a_text_known_by_hand():
    assert bits_per_byte(np.array([math.log(2), math.log(8)]), np.array([1, 3])) == pytest.approx(1.0)
    assert math.isnan(bits_per_byte(np.array([1.0]), np.array([0])))


def test_the_interval_agrees_with_the_standard_error_of_many_documents():
    draw = np.random.default_rng(0)
    text_bytes = draw.integers(50, 300, 400)
    saved = text_bytes * draw.normal(0.1, 0.3, 400)
    measured = gain(saved, text_bytes)
    assert measured.value == pytest.approx(saved.sum() / text_bytes.sum() / math.log(2))
    assert measured.low == pytest.approx(measured.value - 1.96 * measured.stderr, abs=0.2 * measured.stderr)
    assert measured.high == pytest.approx(measured.value + 1.96 * measured.stderr, abs=0.2 * measured.stderr)
    assert gain(saved, text_bytes) == measured


def test_chunks_of_one_document_count_as_one():
    saved, text_bytes = np.array([1.0, 2.0, 30.0, 1.0, 5.0, 6.0]), np.full(6, 10)
    together = gain(saved, text_bytes, ["a", "b", "a", "c", "c", "b"])
    assert together == gain(np.array([31.0, 8.0, 6.0]), np.array([20, 20, 20]))


def test_a_single_document_has_no_interval():
    assert math.isnan(gain(np.array([1.0]), np.array([4])).low)


def make_report(folder):
    report = Report(folder, "numbers", "A | title")
    report.text("A paragraph.")
    report.table(["row", "value"], [["a | b", "1.0"], ["[bold]c", "2.0"]], "Values")
    report.numbers({"gain": Gain(0.1, math.nan, 0.2, 0.05), "rows": [np.float32(1.5), np.arange(2)]})
    report.plot("line", lambda axes: axes.plot([0, 1], [1, 0]))
    report.save()


def test_a_report_is_json_markdown_and_plots(tmp_path, capsys):
    make_report(tmp_path / "new")
    stored = json.loads((tmp_path / "new" / "numbers.json").read_text())
    assert stored == {"gain": {"value": 0.1, "low": None, "high": 0.2, "stderr": 0.05}, "rows": [1.5, [0, 1]]}
    written = (tmp_path / "new" / "numbers.md").read_text()
    assert "| a \\| b | 1.0 |" in written and "![line](numbers_line.svg)" in written
    assert (tmp_path / "new" / "numbers_line.svg").read_text().startswith("<?xml")
    assert "[bold]c" in capsys.readouterr().out


def test_without_matplotlib_the_report_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    make_report(tmp_path)
    assert "pip install 'transformers-retro[evaluation]'" in (tmp_path / "numbers.md").read_text()
    assert not list(tmp_path.glob("*.svg")) and (tmp_path / "numbers.json").exists()
