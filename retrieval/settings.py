"""Declare a setting once: its dataclass field serves the library, YAML files and the command line.

A field's metadata holds its help text under "help", as `HfArgumentParser` reads it.
[`same_setting`] repeats the field in another dataclass; [`add_option`] makes it an option of an
`argparse` parser.
"""

import argparse
import dataclasses
from typing import Any


def same_setting(kind: type, name: str, **changes: Any) -> Any:
    """Return a new field with the default and the help of another dataclass's field.

    Args:
        kind, name: the other dataclass and its field.
        **changes: `default` or `default_factory`, where it differs.
    """
    declared = _field(kind, name)
    default = {"default": declared.default, "default_factory": declared.default_factory}
    return dataclasses.field(metadata=declared.metadata, **changes or default)


def add_option(parser: argparse.ArgumentParser, kind: type, name: str, **changes: Any) -> None:
    """Add a dataclass's field to a parser: an option of the same name, default and help.

    Args:
        kind: the dataclass.
        name: the field; `doc_id_field` becomes `--doc-id-field`.
        **changes: further arguments of `add_argument`, such as `type` and `nargs`.
    """
    declared = _field(kind, name)
    text = declared.metadata["help"]
    if declared.default not in (None, ()) and declared.default is not False:
        text += f" Default: {declared.default}."
    parser.add_argument(f"--{name.replace('_', '-')}", default=declared.default, help=text, **changes)


def _field(kind: type, name: str) -> dataclasses.Field:
    return next(declared for declared in dataclasses.fields(kind) if declared.name == name)
