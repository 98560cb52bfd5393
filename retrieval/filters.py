"""Metadata of documents: what may be stored, and filters on it that no value can widen.

A filter is a mapping from field names to what is wanted there; all fields must match:

    {"source": "wiki"}                          equal
    {"license": ["mit", "apache-2.0"]}          any of them
    {"year": {">=": 1990, "<": 2000}}           a range of numbers
    {"date": {">=": "2024-01-31"}}              or of ISO dates

Milvus Lite and older servers take no parameters in filter expressions, and differ in how they read strings. Therefore no
string of a user's ever becomes part of one: equality compares 64-bit hashes of (field, value), kept in a column of their
own, and ranges hold numbers, dates and field names that are checked character by character.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .hashing import hash64

MAX_FIELDS = 32
FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
DATE = re.compile(r"\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?(Z|[+-]\d{2}:\d{2})?)?")
COMPARISONS = ("<", "<=", ">", ">=")

Scalar = str | int | float | bool
Filter = Mapping[str, Any]


def check_metadata(metadata: Mapping[str, Scalar]) -> None:
    """Raises ValueError unless it is a few named strings, finite numbers and truth values."""
    if len(metadata) > MAX_FIELDS:
        raise ValueError(f"A document may carry {MAX_FIELDS} metadata fields, this one has {len(metadata)}.")
    for name, value in metadata.items():
        _check_name(name)
        _check_value(name, value)


def tags(metadata: Mapping[str, Scalar]) -> list[int]:
    """The hash of each (field, value), which equality is tested by."""
    return [_tag(name, value) for name, value in metadata.items()]


def filter_expression(wanted: Filter) -> str:
    """Return the filter as an expression of Milvus; empty when everything is wanted.

    Raises:
        ValueError: a field name, a comparison or a value that no filter can have.
    """
    if not isinstance(wanted, Mapping):
        raise ValueError(f"A filter is a mapping such as {{'source': 'wiki'}}, not {wanted!r}.")
    parts = []
    for name, value in wanted.items():
        _check_name(name)
        if isinstance(value, Mapping):
            parts += [_range(name, comparison, bound) for comparison, bound in value.items()]
            if not value:
                raise ValueError(f"The range for {name!r} has no bound.")
        else:
            values = value if isinstance(value, list | tuple | set | frozenset) else [value]
            if not values:
                raise ValueError(f"The list of wanted values for {name!r} is empty: nothing could match.")
            for item in values:
                _check_value(name, item)
            parts.append(f"array_contains_any(tags, {sorted(_tag(name, item) for item in values)})")
    return " and ".join(parts)


def all_of(expressions: Iterable[str]) -> str:
    """Join expressions; empty ones want everything."""
    return " and ".join(f"({expression})" for expression in expressions if expression)


def parse_filter(text: str) -> Filter:
    """Read a filter from JSON, as the command line takes it.

    Raises:
        ValueError: it is not a JSON object, or no filter.
    """
    try:
        wanted = json.loads(text)
    except ValueError as error:
        raise ValueError(f'The filter is not JSON ({error}); it looks like \'{{"source": "wiki"}}\'.') from error
    filter_expression(wanted)
    return wanted


def _range(name: str, comparison: str, bound: Any) -> str:
    if comparison not in COMPARISONS:
        raise ValueError(f"{comparison!r} is no comparison for {name!r}; there are {', '.join(COMPARISONS)}.")
    if isinstance(bound, bool) or not isinstance(bound, int | float | str):
        raise ValueError(f"{name!r} can be compared with a number or an ISO date, not {bound!r}.")
    if isinstance(bound, str):
        if not DATE.fullmatch(bound) or not bound.isascii():
            raise ValueError(f"{name!r} can be compared with a number or a date such as '2024-01-31', not {bound!r}.")
        return f'metadata["{name}"] {comparison} "{bound}"'
    _check_value(name, bound)
    return f'metadata["{name}"] {comparison} {bound!r}'


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not FIELD_NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot name a metadata field: a letter or _, then up to 63 letters, digits or _ of ASCII."
        )


def _check_value(name: str, value: Any) -> None:
    if not isinstance(value, str | int | float | bool):
        raise ValueError(f"Metadata field {name!r} must be a string, number or truth value, not {value!r}.")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"Metadata field {name!r} has a lone surrogate in it: {value!r} is not valid text."
            ) from None
        if len(value) > 4096:
            raise ValueError(f"Metadata field {name!r} has {len(value)} characters; at most 4096 are stored.")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"Metadata field {name!r} is {value}; numbers must be finite.")
    elif isinstance(value, int) and not -(2**63) < value < 2**63:
        raise ValueError(f"Metadata field {name!r} is {value}, more than 64 bits.")


def _tag(name: str, value: Scalar) -> int:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)  # 3.0 is what 3 is asked for as
    text = json.dumps([name, value])
    # 63 bits: the least 64-bit number is one that servers cannot read
    return hash64(text) >> 1
