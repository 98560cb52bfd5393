"""Filters: both back ends agree, wrong filters are refused, and no text of a user's is code."""

import datetime
import decimal
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval import Document, ingest
from retrieval.filters import COMPARISONS, filter_expression, parse_filter, row_predicate

from ..support.places import CHUNK

scalars = st.one_of(st.text(), st.booleans(), st.integers(), st.floats())


names = st.one_of(st.text(), st.sampled_from(["a", "year"]))
ranges = st.dictionaries(st.one_of(st.text(), st.sampled_from(COMPARISONS)), scalars)


@given(st.dictionaries(names, st.one_of(scalars, st.lists(scalars), ranges)))
def test_an_expression_holds_no_string_but_names_and_dates(wanted):
    try:
        expression = filter_expression(wanted)
    except ValueError:
        return
    number = r"-?\d+(\.\d+)?(e[+-]?\d+)?"
    equality = rf"array_contains_any\(tags, \[{number}(, {number})*\]\)"
    bound = rf'({number}|"[0-9T :.Z+-]+")'
    comparison = rf'metadata\["[A-Za-z_][A-Za-z0-9_]*"\] (<|<=|>|>=) {bound}'
    inequality = rf'\(not {equality} and \(exists metadata\["[A-Za-z_][A-Za-z0-9_]*"\]\)\)'
    part = f"({equality}|{comparison}|{inequality})"
    assert re.fullmatch(f"({part}( and {part})*)?", expression), expression


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"a": {"==": 1}}, "Unknown comparison '==' for 'a'. Use one of <, <=, >, >=, !="),
        ({"a": {}}, "The range for 'a' is empty"),
        ({"a": []}, "The list of wanted values for 'a' is empty"),
        ("source == 1", "is a mapping"),
    ],
)
@pytest.mark.parametrize("back_end", [filter_expression, row_predicate])
def test_wrong_filters_are_refused_by_both_back_ends(back_end, wanted, message):
    with pytest.raises(ValueError, match=message):
        back_end(wanted)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({'a"] == 1 or metadata["b': 1}, "cannot name a metadata field"),
        ({"a": {">": '2024" or "'}}, "number or a date"),
        ({"a": {">": True}}, "number or an ISO date"),
        ({"a": {">": float("inf")}}, "finite"),
        ({"a": None}, "must be a string, number"),
        ({"a": {"!=": [1]}}, "must be a string, number"),
        ({"a": "\ud800"}, "lone surrogate"),
    ],
)
def test_what_milvus_cannot_store_is_refused(wanted, message):
    with pytest.raises(ValueError, match=message):
        filter_expression(wanted)


ROWS = [
    {"source": "wiki", "year": 1999, "date": "2023-12-31"},
    {"source": "web", "year": 2005, "checked": True, "date": "2024-01-01"},
    {"source": "wiki", "year": 2010.5, "checked": False, "date": "2024-01-01T10:00Z"},
    {"source": 'wiki" or year > 0', "year": -3},
    {"source": "", "year": 2005.0, "checked": 1},
    {"source": "Wiki", "year": "2005", "checked": 0},
    {"year": 2**62, "source": 1e300},
    {"date": "soon", "source": 2**53},
    {},
]
BOUNDS = st.one_of(st.sampled_from([-3, 1999, 2005, 2010.5, 1e12]), st.integers(-4, 3000), st.floats(-4, 3000))
DATES = st.sampled_from(["2023-12-31", "2024-01-01", "2024-01-01T10:00Z", "2025-01-01"])
VALUES = st.sampled_from([value for row in ROWS for value in row.values()] + ["none", 1.0, 2**53 + 1, float(2**53)])


def condition(comparison, bounds):
    """Values, lists of them, or one or two comparisons."""
    pairs = st.dictionaries(comparison, bounds, min_size=1, max_size=2)
    unequal = st.fixed_dictionaries({"!=": VALUES})
    return st.one_of(VALUES, st.lists(VALUES, min_size=1, max_size=3), unequal, pairs)


def test_both_back_ends_pick_the_same_documents(place, tokenizer, embedder):
    documents = [Document(f"d{number}", "a text", row) for number, row in enumerate(ROWS)]
    store = place.store()
    ingest(documents, store, tokenizer, embedder, chunk_size=CHUNK)
    ranges = st.sampled_from([sign for sign in COMPARISONS if sign != "!="])
    filters = st.fixed_dictionaries(
        {},
        optional={
            "source": condition(st.just("!="), VALUES),
            "checked": condition(st.just("!="), VALUES),
            "date": condition(ranges, DATES),
            "nothing": condition(ranges, BOUNDS),
        },
    )
    years = condition(ranges, BOUNDS)

    @settings(max_examples=100 if place.is_lite else 40, deadline=None)
    @given(filters, st.one_of(st.none(), years))
    def check(wanted, year):
        wanted = wanted if year is None else wanted | {"year": year}
        expected = {document.id for document in documents if kept(row_predicate(wanted), document.metadata)}
        found = {row["doc_id"] for row in store.scan(("doc_id",), filter_expression(wanted))}
        assert found == expected, (wanted, filter_expression(wanted))

    check()


def kept(matches, row):
    """Return False where Python refuses to compare: Milvus finds nothing there."""
    try:
        return matches(row)
    except ValueError as error:
        assert "cannot be compared" in str(error)
        return False


class TestRowsOfADataset:
    """Columns have names and values that Milvus could not store."""

    @pytest.mark.parametrize(
        ("wanted", "row", "matches"),
        [
            ({"Größe (m)": 3}, {"Größe (m)": 3.0}, True),
            ({"day": {">=": datetime.date(2024, 1, 1)}}, {"day": datetime.date(2024, 2, 1)}, True),
            ({"day": {"!=": datetime.date(2024, 1, 1)}}, {"day": datetime.date(2024, 1, 1)}, False),
            ({"name": {"<": "b"}}, {"name": "a"}, True),
            ({"tags": [["x", "y"]]}, {"tags": ["x", "y"]}, True),
            ({"tags": ["x", "y"]}, {"tags": ["x"]}, False),
            ({"price": 1.5}, {"price": decimal.Decimal("1.5")}, True),
            ({"n": {"<": 2**80}}, {"n": 2**70}, True),
            ({"n": ("a", None)}, {"n": None}, False),
            ({"n": {"!=": 1}}, {"n": None}, False),
            ({"n": {"!=": 1}}, {}, False),
            ({"n": 1}, {"n": True}, False),
            ({}, {}, True),
        ],
    )
    def test_rows_are_picked_by_their_values(self, wanted, row, matches):
        assert row_predicate(wanted)(row) is matches

    def test_a_value_that_cannot_be_compared_is_named(self):
        with pytest.raises(ValueError, match="field 'n' of a row, 'a text' cannot be compared with 3"):
            row_predicate({"n": {">": 3}})({"n": "a text"})


def test_a_filter_on_the_command_line_is_json():
    assert parse_filter('{"year": {">=": 2000}}') == {"year": {">=": 2000}}
    with pytest.raises(ValueError, match="not JSON"):
        parse_filter("source=wiki")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a": [1]}, "must be a string"),
        ({"a": float("nan")}, "finite"),
        ({"a": 2**63}, "integers must be between"),
        ({"a": "x" * 5000}, "at most 4096"),
        ({f"f{i}": i for i in range(33)}, "32 metadata fields"),
    ],
)
def test_wrong_metadata_is_refused(metadata, message):
    with pytest.raises(ValueError, match=message):
        Document("id", "text", metadata)
