"""Filters and index settings that cannot be are refused before Milvus sees them; nothing of a user's is in an expression."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval import Document, IndexSettings
from retrieval.filters import filter_expression, parse_filter
from retrieval.indexes import KINDS, recommend

scalars = st.one_of(st.text(), st.booleans(), st.integers(), st.floats())


@given(st.dictionaries(st.text(), st.one_of(scalars, st.lists(scalars), st.dictionaries(st.text(), scalars))))
def test_an_expression_has_no_string_but_names_and_dates(wanted):
    try:
        expression = filter_expression(wanted)
    except ValueError:
        return
    number = r"-?\d+(\.\d+)?(e[+-]?\d+)?"
    equality = rf"array_contains_any\(tags, \[{number}(, {number})*\]\)"
    bound = rf'({number}|"[0-9T :.Z+-]+")'
    comparison = rf'metadata\["[A-Za-z_][A-Za-z0-9_]*"\] (<|<=|>|>=) {bound}'
    part = f"({equality}|{comparison})"
    assert re.fullmatch(f"({part}( and {part})*)?", expression), expression


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({'a"] == 1 or metadata["b': 1}, "cannot name a metadata field"),
        ({"a": {"==": 1}}, "no comparison"),
        ({"a": {">": '2024" or "'}}, "number or a date"),
        ({"a": {">": True}}, "number or an ISO date"),
        ({"a": {">": float("inf")}}, "finite"),
        ({"a": {}}, "no bound"),
        ({"a": []}, "nothing could match"),
        ({"a": None}, "must be a string, number"),
        ({"a": "\ud800"}, "lone surrogate"),
        ("source == 1", "is a mapping"),
    ],
)
def test_filters_that_cannot_be(wanted, message):
    with pytest.raises(ValueError, match=message):
        filter_expression(wanted)


def test_a_filter_on_the_command_line_is_json():
    assert parse_filter('{"year": {">=": 2000}}') == {"year": {">=": 2000}}
    with pytest.raises(ValueError, match="not JSON"):
        parse_filter("source=wiki")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a": [1]}, "must be a string"),
        ({"a": float("nan")}, "finite"),
        ({"a": 2**63}, "64 bits"),
        ({"a": "x" * 5000}, "at most 4096"),
        ({f"f{i}": i for i in range(33)}, "32 metadata fields"),
    ],
)
def test_metadata_that_cannot_be(metadata, message):
    with pytest.raises(ValueError, match=message):
        Document("id", "text", metadata)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FAISS", "There is no index 'FAISS'; there are FLAT"),
        ("HNSW:nlist=3", "HNSW has no parameter 'nlist'; it has M, efConstruction, ef"),
        ("HNSW:M=1", "between 2 and 2048, not 1"),
        ("HNSW:M=many", "whole number"),
        ("HNSW:M", "not of the form"),
        ("FLAT:ef=3", "it has none"),
    ],
)
def test_index_settings_that_cannot_be(text, message):
    with pytest.raises(ValueError, match=message):
        IndexSettings.parse(text)


def test_index_settings():
    settings = IndexSettings.parse("hnsw:M=32")
    assert settings.build == {"M": 32, "efConstruction": 200} and settings.search == {"ef": 64}
    assert settings.search_params(500) == {"params": {"ef": 500}}
    assert IndexSettings.parse("IVF_FLAT:nlist=16").search == {"nprobe": 16}
    for kind in KINDS:
        IndexSettings.parse(kind)
    sizes = [1000, 10**6, 10**9]
    assert [recommend(n, is_lite=False).kind for n in sizes] == ["FLAT", "HNSW", "DISKANN"]
    assert [recommend(n, is_lite=True).kind for n in sizes] == ["FLAT", "HNSW", "HNSW"]
    with pytest.raises(ValueError, match="must divide the dimension 384"):
        IndexSettings.parse("IVF_PQ:m=5").check("here", is_lite=False, version=(2, 3), dimension=384)
