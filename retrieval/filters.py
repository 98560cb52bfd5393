"""Filters: one grammar for the metadata in Milvus and for the rows of a dataset.

A filter is a mapping from field names to wanted values. All fields must match:

    {"source": "wiki"}                          equal
    {"license": ["mit", "apache-2.0"]}          any of them
    {"year": {">=": 1990, "<": 2000}}           a range
    {"source": {"!=": "web"}}                   present, and not equal

A document without the field never matches. True and False never equal a number. Do not use ranges
on booleans: Python and Milvus Lite treat them as 1 and 0, but servers never match them.

[`row_predicate`] checks a row in Python, with any column names and values. [`filter_expression`]
asks Milvus, which stores less: field names are ASCII, values are strings, finite 64-bit numbers
and truth values, and ranges compare numbers or ISO dates.

Milvus Lite and older servers take no parameters in filter expressions, and they read strings
differently. So no string of a user's ever becomes part of an expression. Equality compares 64-bit
hashes of (field, value), which have their own column. Ranges hold only numbers, dates and field
names, each checked character by character.
"""

import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .hashing import hash64

MAX_FIELDS = 32
MAX_TEXT = 4096  # characters in a metadata string
FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
DATE = re.compile(r"\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?(Z|[+-]\d{2}:\d{2})?)?")
RANGES: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
COMPARISONS = (*RANGES, "!=")

Scalar = str | int | float | bool
Filter = Mapping[str, Any]


@dataclass(frozen=True)
class Condition:
    """One condition on one field.

    Attributes:
        field: name of the field.
        comparison: "in" or one of `COMPARISONS`.
        wanted: the list of wanted values for "in", otherwise the value to compare with.
    """

    field: str
    comparison: str
    wanted: Any


def check_metadata(metadata: Mapping[str, Scalar]) -> None:
    """Raise ValueError unless these are a few named strings, finite numbers and truth values."""
    if len(metadata) > MAX_FIELDS:
        raise ValueError(f"A document may carry {MAX_FIELDS} metadata fields, this one has {len(metadata)}.")
    for name, value in metadata.items():
        _check_name(name)
        _check_value(name, value)


def tags(metadata: Mapping[str, Scalar]) -> list[int]:
    """Return the hash of each (field, value), by which equality is tested."""
    return [_tag(name, value) for name, value in metadata.items()]


def conditions(wanted: Filter) -> list[Condition]:
    """Split a filter into its conditions, all of which must hold.

    Raises:
        ValueError: the filter is no mapping, a comparison is unknown, or a list or range is empty.
    """
    if not isinstance(wanted, Mapping):
        raise ValueError(f"A filter is a mapping such as {{'source': 'wiki'}}, not {wanted!r}.")
    found = []
    for name, value in wanted.items():
        if isinstance(value, Mapping):
            for comparison, bound in value.items():
                if comparison not in COMPARISONS:
                    raise ValueError(
                        f"Unknown comparison {comparison!r} for {name!r}. Use one of {', '.join(COMPARISONS)}."
                    )
                found.append(Condition(name, comparison, bound))
        else:
            value = list(value) if isinstance(value, list | tuple | set | frozenset) else [value]
            found.append(Condition(name, "in", value))
        if not value:
            kind = "range" if isinstance(value, Mapping) else "list of wanted values"
            raise ValueError(f"The {kind} for {name!r} is empty. Name at least one value, or leave {name!r} out.")
    return found


def row_predicate(wanted: Filter) -> Callable[[Mapping[str, Any]], bool]:
    """Return the filter as a function that takes a row and returns True if the row matches.

    The function raises ValueError if a row's value cannot be compared with a range's bound.

    Raises:
        ValueError: as [`conditions`].
    """
    checks = conditions(wanted)
    return lambda row: all(_holds(condition, row.get(condition.field)) for condition in checks)


def filter_expression(wanted: Filter) -> str:
    """Return the filter as an expression of Milvus; an empty filter gives an empty one.

    Raises:
        ValueError: as [`conditions`], or Milvus cannot store such a field name or value.
    """
    return " and ".join(map(_expression, conditions(wanted)))


def all_of(expressions: Iterable[str]) -> str:
    """Join expressions of Milvus, all of which must hold; skip empty ones."""
    return " and ".join(f"({expression})" for expression in expressions if expression)


def parse_filter(text: str) -> Filter:
    """Read a filter for Milvus from JSON, as on the command line.

    Raises:
        ValueError: the text is not JSON, or the filter is wrong.
    """
    try:
        wanted = json.loads(text)
    except ValueError as error:
        raise ValueError(f'The filter is not JSON ({error}). Write it like \'{{"source": "wiki"}}\'.') from error
    filter_expression(wanted)
    return wanted


def _holds(condition: Condition, value: Any) -> bool:
    if value is None:
        return False
    if condition.comparison == "in":
        return any(_equal(value, wanted) for wanted in condition.wanted)
    if condition.comparison == "!=":
        return not _equal(value, condition.wanted)
    try:
        return RANGES[condition.comparison](value, condition.wanted)
    except TypeError as error:
        raise ValueError(
            f"In field {condition.field!r} of a row, {value!r} cannot be compared with {condition.wanted!r} ({error})."
        ) from error


def _expression(condition: Condition) -> str:
    name, comparison, wanted = condition.field, condition.comparison, condition.wanted
    _check_name(name)
    if comparison in RANGES:
        return f'metadata["{name}"] {comparison} {_bound(name, wanted)}'
    values = wanted if comparison == "in" else [wanted]
    for value in values:
        _check_value(name, value)
    equal = f"array_contains_any(tags, {sorted(_tag(name, value) for value in values)})"
    # servers read all that follows a bare `exists` as its argument
    return equal if comparison == "in" else f'(not {equal} and (exists metadata["{name}"]))'


def _bound(name: str, bound: Any) -> str:
    """Return a bound of a range as Milvus reads it."""
    if isinstance(bound, bool) or not isinstance(bound, int | float | str):
        raise ValueError(f"{name!r} can be compared with a number or an ISO date, not {bound!r}.")
    if isinstance(bound, str):
        if not DATE.fullmatch(bound) or not bound.isascii():
            raise ValueError(f"{name!r} can be compared with a number or a date such as '2024-01-31', not {bound!r}.")
        return f'"{bound}"'
    _check_value(name, bound)
    return repr(bound)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not FIELD_NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot name a metadata field. Use a letter or _, then up to 63 letters, digits or _ of ASCII."
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
        if len(value) > MAX_TEXT:
            raise ValueError(f"Metadata field {name!r} has {len(value)} characters; at most {MAX_TEXT} are stored.")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"Metadata field {name!r} is {value}; numbers must be finite.")
    elif isinstance(value, int) and not -(2**63) < value < 2**63:
        raise ValueError(f"Metadata field {name!r} is {value}; integers must be between -2**63 and 2**63.")


def _equal(value: Any, wanted: Any) -> bool:
    """Return True if Milvus, too, would treat the values as equal (see `_tag`)."""
    value, wanted = _plain(value), _plain(wanted)
    both_numbers = isinstance(value, int | float) and isinstance(wanted, int | float)
    if both_numbers and any(isinstance(value, kind) != isinstance(wanted, kind) for kind in (bool, float)):
        return False
    return bool(value == wanted)


def _plain(value: Any) -> Any:
    """Return whole floats as integers, so that 3.0 equals 3."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _tag(name: str, value: Scalar) -> int:
    # 63 bits: servers cannot read the least 64-bit number
    return hash64(json.dumps([name, _plain(value)])) >> 1
