"""Parse settings from flags, a YAML file, or both, into dataclasses."""

import dataclasses
import difflib
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


class _Loader(yaml.SafeLoader):
    """Reads 6e-5 as a number, as YAML 1.2 does. PyYAML reads YAML 1.1, in which it is text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+\Z"), list("-+.0123456789")
)


def make_parser(kinds: Any, program: str, usage: str | None = None) -> HfArgumentParser:
    """Return a parser whose flags are the fields of one dataclass or several."""
    return HfArgumentParser(kinds, prog=program, usage=usage, allow_abbrev=False)


def parse_settings(
    kinds: tuple[type, ...], program: str, argv: list[str] | None, check: Callable[..., None]
) -> tuple[Any, ...]:
    """Parse flags, or one YAML file and flags that override it, into dataclasses.

    An error ends the program with a message.

    Args:
        kinds: the dataclasses, whose fields are the settings.
        program: the program's name, for messages.
        argv: the arguments; None takes those of this process.
        check: called with the dataclasses; raises ValueError or OSError if they do not go together.

    Returns:
        an instance of each dataclass.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    usage = f"{program} [config.yaml] [--name value ...]   (--help lists the names)"
    parser = make_parser(kinds, program, usage)
    known = {field.name for kind in kinds for field in dataclasses.fields(kind) if field.init}
    try:
        if argv and not argv[0].startswith("-"):
            settings = _read_yaml(Path(argv.pop(0)))
            if unknown := sorted(set(settings) - known):
                raise ValueError(unknown_settings("the configuration file has", unknown, known))
            for action in parser._actions:
                action.required &= action.dest not in settings
            # Numbers become text: the parser converts and checks text alone.
            parser.set_defaults(**{k: str(v) if isinstance(v, (int, float)) else v for k, v in settings.items()})
        *parsed, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
        if rest:
            unknown = [word.lstrip("-").partition("=")[0] for word in rest if word.startswith("-")] or rest
            raise ValueError(unknown_settings("there are", unknown, known))
        check(*parsed)
    except (ValueError, OSError, yaml.YAMLError) as error:
        parser.error(str(error))
    return tuple(parsed)


def as_mapping(name: str, value: dict | str | None) -> dict | None:
    """Return a setting that is a mapping; a flag gives it as YAML text.

    Raises:
        ValueError: the value is no mapping.
    """
    if isinstance(value, str):
        value = yaml.load(value, _Loader)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r}. It must map names to values, like '{{n_layer: 6}}'.")
    return value


def unknown_settings(where: str, unknown: list[str], known: Collection[str]) -> str:
    """Return an error message that lists unknown settings with the known names closest to them."""
    hints = {name: difflib.get_close_matches(name, known, n=1) for name in unknown}
    listed = ", ".join(f"{name} (did you mean {close[0]}?)" if close else name for name, close in hints.items())
    return f"{where} unknown settings: {listed}"


def _read_yaml(path: Path) -> dict[str, Any]:
    """Read the settings of a YAML file."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no configuration file {str(path)!r}.")
    text = path.read_text(encoding="utf-8")
    settings = yaml.load(text, _Loader) or {}
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path} is a {type(settings).__name__}. It must map names to values, such as 'block_size: 512'."
        )
    plain = yaml.safe_load(text)  # YAML 1.1's text stays text here: the parser knows where a number is wanted
    return {name: plain[name] if isinstance(plain[name], str) else value for name, value in settings.items()}
