"""Detokenization: the exact bytes that each token of a tokenizer stands for.

A decoder of `tokenizers` makes a text of a whole sequence, and changes it at the ends: one drops
the first space, another puts a space between any two tokens. Here a token's bytes depend on the
token alone, so that the bytes of chunks, joined, are the bytes of their document.

They follow from how the tokenizer reads text, not from its decoder, which may be wrong: the
conversion of a GGUF file, for example, writes one that fits another kind of tokenizer.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .labels import short_name

BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a piece that stands for one byte
# Text on which a tokenizer without a backend must show that its pieces give the text back.
SHORT_PROBE = "It reads two words, na\u00efvely: \u6f22\u5b57."
REMEDY = "Use a decoder whose tokenizer is byte-level or like sentencepiece, in its fast version."
DROP_SPACES = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit")


@dataclass(frozen=True)
class TokenBytes:
    """The bytes that each token stands for.

    Attributes:
        pieces: the bytes of each id. An id that no token has stands for none.
        adds_space: the tokenizer puts a space before each text. It belongs to the first token's
            bytes, and not to the text.
        unspaced: ids of added tokens that take this space's place: text that begins with one gets
            no space.
        restarts: ids of added tokens behind which the tokenizer puts a space again.
    """

    pieces: Mapping[int, bytes]
    adds_space: bool = False
    unspaced: frozenset[int] = frozenset()
    restarts: frozenset[int] = frozenset()

    def join(self, tokens: Sequence[int], starts_text: bool) -> bytes:
        """Return the bytes of tokens.

        Args:
            starts_text: the tokens begin a text, so that a space that the tokenizer added is left
                out.
        """
        pieces = [self.pieces.get(token, b"") for token in tokens]
        if self.adds_space:
            starts = [0] if starts_text else []
            starts += [place + 1 for place, token in enumerate(tokens[:-1]) if token in self.restarts]
            for place in starts:
                if place < len(pieces) and tokens[place] not in self.unspaced:
                    pieces[place] = pieces[place].removeprefix(b" ")
        return b"".join(pieces)


def backend_json(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the JSON of a fast tokenizer; an empty one for a slow tokenizer."""
    return json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}


def is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if each character of a token's name stands for a byte, as in GPT-2."""
    return _is_byte_level(backend_json(tokenizer))


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    """Return the bytes that each token of a tokenizer stands for.

    Raises:
        ValueError: the tokens do not tell where the text has spaces, as those of WordPiece.
    """
    backend = backend_json(tokenizer)
    if not backend:
        return _measured(tokenizer)
    model = backend["model"]
    if reason := _loses_text(backend):
        raise ValueError(f"The tokenizer {_name(tokenizer)} loses text: {reason}. {REMEDY}")
    vocabulary = model["vocab"]
    items = enumerate(piece for piece, _ in vocabulary) if model["type"] == "Unigram" else _flipped(vocabulary)
    added = {token["id"]: token for token in backend["added_tokens"]}
    mark, is_byte_level, falls_back = _space_mark(backend), _is_byte_level(backend), model.get("byte_fallback")
    byte_of = byte_decoder()

    def of_piece(piece: str) -> bytes:
        if is_byte_level:
            known = all(character in byte_of for character in piece)
            return bytes(map(byte_of.__getitem__, piece)) if known else piece.encode()
        if falls_back and (match := BYTE_FALLBACK.fullmatch(piece)):
            return bytes.fromhex(match[1])
        return (piece.replace(mark, " ") if mark else piece).encode()

    pieces = {index: of_piece(piece) for index, piece in items}
    prepends = any(part["type"] == "Prepend" for part in _parts(backend, "normalizer"))
    adds_space = puts_space_before(backend)
    for index, token in added.items():
        content = token["content"]
        if not token["special"] and index in pieces and mark and set(content) == {mark}:
            continue  # Gemma's runs of spaces
        # where a normalizer prepends a space, it prepends one to this token's text, too
        pieces[index] = (" " * (prepends and token["normalized"]) + content).encode()
    unspaced = {index for index, token in added.items() if not (prepends and token["normalized"])}
    return TokenBytes(
        pieces,
        adds_space,
        frozenset(unspaced),
        frozenset(unspaced if prepends else ()),
    )


def byte_decoder() -> dict[str, int]:
    """Return the byte of each of GPT-2's 256 printable characters.

    This is the inverse of `bytes_to_unicode` in OpenAI's encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _flipped(vocabulary: dict[str, int]) -> Iterator[tuple[int, str]]:
    return ((index, piece) for piece, index in vocabulary.items())


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return repr(short_name(tokenizer.name_or_path or type(tokenizer).__name__))


def _parts(backend: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or a pre-tokenizer; sequences are unpacked."""

    def unpack(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        if part is None:
            return
        if part["type"] != "Sequence":
            yield part
        for inner in part.get("normalizers") or part.get("pretokenizers") or ():
            yield from unpack(inner)

    return list(unpack(backend.get(name)))


def _is_byte_level(backend: dict[str, Any]) -> bool:
    steps = [*_parts(backend, "normalizer"), *_parts(backend, "pre_tokenizer")]
    return any(step["type"] == "ByteLevel" for step in steps)


def puts_space_before(backend: dict[str, Any]) -> bool:
    """Return True if a tokenizer, given by its JSON, puts a space before each text."""
    prepends = any(step["type"] == "Prepend" for step in _parts(backend, "normalizer"))
    return prepends or any(map(_adds_space, _parts(backend, "pre_tokenizer")))


def _space_mark(backend: dict[str, Any]) -> str | None:
    """Return the character that stands for a space in sentencepiece's pieces, usually "▁"."""
    for step in _parts(backend, "pre_tokenizer"):
        if step["type"] == "Metaspace":
            return str(step["replacement"])
    for step in _parts(backend, "normalizer"):
        if step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"].strip():
            return str(step["content"])
    return None


def _adds_space(step: dict[str, Any]) -> bool:
    """Return True if a step of a pre-tokenizer puts a space before a text."""
    if step["type"] == "Metaspace":
        scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space") else "never")
        return scheme != "never"
    return step["type"] == "ByteLevel" and bool(step["add_prefix_space"])


def _loses_text(backend: dict[str, Any]) -> str:
    """Return why tokens do not tell where the text has spaces, or ""."""
    model = backend["model"]
    if model["type"] not in ("BPE", "Unigram"):
        return f"its model is {model['type']}, whose tokens do not hold the spaces between words"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its BPE marks the parts of words, and does not hold the spaces between words"
    steps = _parts(backend, "pre_tokenizer")
    if _space_mark(backend) is not None or any(map(_adds_space, steps)):
        return ""
    for step in steps:
        # an inverted split removes what its expression, which matches all text, leaves over
        if step["type"] in DROP_SPACES or (step.get("behavior") == "Removed" and not step.get("invert")):
            return f"its pre-tokenizer ({step['type']}) drops the spaces between words"
    return ""


def _measured(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    """Return the bytes of a slow tokenizer's tokens: what each adds to a text behind another token.

    Raises:
        ValueError: these bytes do not give a text back.
    """
    ids = tokenizer(SHORT_PROBE, add_special_tokens=False)["input_ids"]

    def text(*tokens: int) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    vocabulary = tokenizer.get_vocab().values()
    anchor = ids[0]
    before = text(anchor)
    pieces = {}
    for index in vocabulary:
        behind = text(anchor, index)
        pieces[index] = (behind.removeprefix(before) if behind.startswith(before) else text(index)).encode()
    for index, token in tokenizer.added_tokens_decoder.items():
        pieces[index] = token.content.encode()
    measured = TokenBytes(pieces)
    joined = measured.join(ids, True)
    if joined == b" " + SHORT_PROBE.encode():
        return TokenBytes(pieces, adds_space=True)
    if joined != SHORT_PROBE.encode():
        raise ValueError(
            f"The tokenizer {_name(tokenizer)} loses text: the tokens of {SHORT_PROBE!r} give "
            f"{joined.decode(errors='replace')!r}. {REMEDY}"
        )
    return measured
