"""Analyzers: how Milvus cuts text into words, for search by words (BM25)."""

import importlib.util
import json
import re
from collections.abc import Mapping
from typing import Any

from .errors import KnowledgeBaseError

Analyzer = Mapping[str, Any]

MAX_TEXT_BYTES = 65_535  # of UTF-8; Milvus stores no longer VARCHAR
WORDS_SINCE = (2, 5)  # first version of a server with BM25
CODE = {"type": "code"}  # this library's own; Milvus has no type of this name
BUILT_IN = ("standard", "english", "chinese")  # of Milvus
LITE_TOKENIZERS = ("standard", "jieba")
_IDENTIFIER = re.compile(r"\w+")
# Where an identifier is cut: getHTTPResponse2 → get HTTP Response 2
_BORDER = re.compile(r"_+|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=\d)(?=[^\W\d])|(?<=[^\W\d])(?=\d)")


def parse_analyzer(setting: str | Analyzer | None) -> dict[str, Any]:
    """Return an analyzer's settings, as a collection's identity stores them.

    Args:
        setting: "standard" (the default), "english", "chinese", "code", or Milvus' own
            analyzer_params as JSON or as a mapping. "code" cuts identifiers into their words:
            `readFile` and `read_file` become the words read, file and readfile.

    Raises:
        ValueError: there is no analyzer of that name, or the JSON is not an object.
    """
    if setting is None:
        setting = "standard"
    if isinstance(setting, Mapping):
        return json.loads(json.dumps(dict(setting)))
    if setting in (*BUILT_IN, CODE["type"]):
        return {"type": setting}
    names = ", ".join((*BUILT_IN, CODE["type"]))
    if not setting.lstrip().startswith("{"):
        raise ValueError(
            f"There is no analyzer {setting!r}. Use one of {names}, or Milvus' analyzer_params as a JSON object."
        )
    try:
        params = json.loads(setting)
    except ValueError as error:
        raise ValueError(
            f"The analyzer {setting!r} is not valid JSON: {error}. Use a JSON object, or one of {names}."
        ) from None
    return params


def milvus_params(analyzer: Analyzer) -> dict[str, Any]:
    """Return Milvus' `analyzer_params`."""
    return {"type": "standard"} if analyzer == CODE else dict(analyzer)


def searched_text(text: str, analyzer: Analyzer) -> str:
    """Return the text that Milvus indexes and searches, at most 65,535 bytes of UTF-8.

    A longer one is cut between two characters.
    """
    if analyzer == CODE:
        text = " ".join(word for match in _IDENTIFIER.finditer(text) for word in _words(match.group()))
    encoded = text.encode()
    return text if len(encoded) <= MAX_TEXT_BYTES else encoded[:MAX_TEXT_BYTES].decode(errors="ignore")


def _words(identifier: str) -> list[str]:
    """Return an identifier's parts and, if there are several, the parts as one word."""
    parts = [part.lower() for part in _BORDER.split(identifier) if part]
    return [*parts, "".join(parts)] if len(parts) > 1 else parts


def check_analyzer(analyzer: Analyzer, where: str, *, is_lite: bool, version: tuple[int, ...]) -> None:
    """Check that this Milvus searches by words and knows the analyzer, before anything is made.

    Milvus Lite takes settings that it then ignores: those are refused. A server checks the
    analyzer itself when the collection is made.

    Args:
        where: name of the collection in errors.

    Raises:
        KnowledgeBaseError: it has no BM25, or does not know the analyzer.
    """
    if not is_lite and version < WORDS_SINCE:
        raise KnowledgeBaseError(
            f"{where}: search by words needs Milvus 2.5 or newer, this server is {'.'.join(map(str, version))}. Use "
            "--search dense, a newer server, or Milvus Lite."
        )
    if is_lite and (unknown := _unknown_to_lite(milvus_params(analyzer))):
        raise KnowledgeBaseError(
            f"{where}: Milvus Lite does not know {unknown} of the analyzer {json.dumps(dict(analyzer))}. Use the "
            "analyzer standard or code, the tokenizer standard or jieba with a list of stop words, or a server."
        )


def _unknown_to_lite(params: Mapping[str, Any]) -> str | None:
    """Name the first setting that Milvus Lite would refuse or ignore."""
    tokenizer = params.get("tokenizer", params.get("type", "standard"))
    options = tokenizer if isinstance(tokenizer, Mapping) else {"type": tokenizer}
    name = options.get("type")
    if others := params.keys() - {"type", "tokenizer", "filter"}:
        return f"the setting {min(others)!r}"
    if name not in LITE_TOKENIZERS:
        return f"the tokenizer or type {name!r}"
    if name == "jieba" and importlib.util.find_spec("jieba") is None:
        return "the tokenizer 'jieba', as long as the package jieba is not installed,"
    if others := options.keys() - ({"type", "mode", "dict"} if name == "jieba" else {"type"}):
        return f"the tokenizer's setting {min(others)!r}"
    filters = params.get("filter", [])
    if not isinstance(filters, list):
        return f"the filter {filters!r}"
    for step in filters:
        is_stop = isinstance(step, Mapping) and step.get("type") == "stop" and step.keys() == {"type", "stop_words"}
        words = step["stop_words"] if is_stop else None
        known = isinstance(words, list) and not any(str(word).startswith("_") for word in words)
        if not known and step not in ("lowercase", {"type": "lowercase"}):
            return f"the filter {step!r}"
    return None
