"""Bulk tokenization: the ids of a Hugging Face tokenizer, computed by tiktoken where the two provably agree."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from functools import cached_property

import tiktoken
from transformers import PreTrainedTokenizerBase

from .identity import short_name

logger = logging.getLogger(__name__)

# The regular expression of `ByteLevel` pre-tokenization (GPT-2's), as `tokenizers` has it.
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

# Text on which tokenizers differ. Only characters that every Unicode version since 6.0 knows: the ids of this text are
# part of the fingerprint, which must not change with the version of a library.
PROBE_TEXT = (
    "It's we'LL don't I'd've 'tis 3.14159 1,000,000 x=[0]*64;\tif a<=b:\r\n\r\n    return f\"{a!r}\"  \n\n\n   end   \n"
    " e\u0301 \u00e9 na\u00efve \u0416\u0443\u043a \u6f22\u5b57 \u0e44\u0e17\u0e22 \u0645\u0631\u062d\u0628\u0627 "
    "\u200b\u200d\u00a0\u2003\u3000\ufeff \U0001f469\u200d\U0001f4bb \U0001f600\u2665\ufe0f \u2167\u00bd\u0967 "
    "<|endoftext|> </s>[MASK] \x00\x07\x1b\x7f\u0085 aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ________________ ....!?"
)


class BulkTokenizer:
    """Token ids equal to `tokenizer(text, add_special_tokens=False)`, several times faster in bulk.

    tiktoken does the work for byte-level BPE with GPT-2's regular expression and merges in the order of their ids; for
    anything else, and whenever a check of equality fails, the Hugging Face tokenizer itself does.

    Args:
        hf_tokenizer: any `transformers` tokenizer.
    """

    def __init__(self, hf_tokenizer: PreTrainedTokenizerBase) -> None:
        self.hf_tokenizer = hf_tokenizer
        self.name = short_name(hf_tokenizer.name_or_path or type(hf_tokenizer).__name__)
        self.vocab_size = len(hf_tokenizer)
        self.eos_token_id: int | None = hf_tokenizer.eos_token_id
        self._encoding, reason = tiktoken_encoding(hf_tokenizer)
        if self._encoding is not None and self._encode_tiktoken([PROBE_TEXT]) != self._encode_hf([PROBE_TEXT]):
            self._encoding, reason = None, "the two disagree on the probe text"
        if self._encoding is None:
            logger.info("Tokenizing with %s itself, not with tiktoken: %s", self.name, reason)

    @property
    def uses_tiktoken(self) -> bool:
        """Whether tiktoken does the encoding."""
        return self._encoding is not None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens around it; special tokens inside the text become their ids."""
        return self._encode_tiktoken(texts) if self.uses_tiktoken else self._encode_hf(texts)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; a character cut in half at either end becomes U+FFFD."""
        return self.hf_tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @cached_property
    def fingerprint(self) -> str:
        """Hash (hex) of the vocabulary, the merges and the ids of a hard text: equal for equal tokenizers, wherever
        they were loaded from and whatever the versions of the libraries."""
        content = {
            "vocabulary": sorted(self.hf_tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])),
            "merges": _merges(_backend_json(self.hf_tokenizer)),
            "probe": self._encode_hf([PROBE_TEXT])[0],
        }
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()

    def _encode_tiktoken(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return self._encoding.encode_batch(texts, num_threads=os.cpu_count() or 1, allowed_special="all")
        except Exception as error:  # e.g. its regular expression engine gives up on a run of a million spaces
            logger.debug("tiktoken failed on a batch (%s); using %s itself", error, self.name)
            return self._encode_hf(texts)

    def _encode_hf(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.hf_tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoded["input_ids"]


def tiktoken_encoding(tokenizer: PreTrainedTokenizerBase) -> tuple[tiktoken.Encoding | None, str]:
    """A tiktoken encoding equal to `tokenizer`, or (None, why there is none). Needs no network.

    tiktoken merges two neighbors when their bytes together are a token, lowest id first; Hugging Face when the pair is
    in the list of merges, first in the list first. The two are the same when the results of the merges have rising ids
    and every token comes out whole when its own bytes are encoded.
    """
    backend = _backend_json(tokenizer)
    model = backend.get("model", {})
    if model.get("type") != "BPE":
        return None, f"its model is {model.get('type')}, not BPE"
    if any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")):
        return None, "its BPE has dropout, a prefix, a suffix or byte fallback"
    if model.get("ignore_merges") or backend.get("normalizer") is not None:
        return None, "it ignores merges or normalizes text"
    pre = backend.get("pre_tokenizer") or {}
    if pre.get("type") != "ByteLevel" or pre.get("add_prefix_space") or not pre.get("use_regex", True):
        return None, "its pre-tokenizer is not GPT-2's"
    added = backend.get("added_tokens", [])
    odd = any(token["single_word"] or token["lstrip"] or token["rstrip"] or not token["content"] for token in added)
    contents = [token["content"] for token in added]
    nested = any(a != b and a in b for a in contents for b in contents)
    if odd or nested or len({token["normalized"] for token in added}) > 1 or tokenizer.split_special_tokens:
        return None, "its added tokens are matched in a way of their own"

    vocabulary: dict[str, int] = model["vocab"]
    byte_of = _byte_decoder()
    merged = [left + right for left, right in _merges(backend)]
    if not all(character in vocabulary for character in byte_of):
        return None, "some single bytes are not in its vocabulary"
    if any(token not in vocabulary for token in merged):
        return None, "some merges are not in its vocabulary"
    ids = [vocabulary[token] for token in merged]
    if any(second <= first for first, second in zip(ids, ids[1:], strict=False)):
        return None, "its merges are not in the order of their ids"
    if set(vocabulary) - set(merged) - set(byte_of) - set(contents):
        return None, "its vocabulary has tokens that no merge makes"
    bpe = tokenizer.backend_tokenizer.model
    if any(len(bpe.tokenize(token)) != 1 for token in merged):
        return None, "some of its tokens do not come out whole"

    ranks = {bytes(map(byte_of.__getitem__, token)): vocabulary[token] for token in [*byte_of, *merged]}
    special = {token["content"]: token["id"] for token in added}
    if len(ranks) != len(byte_of) + len(merged) or set(ranks.values()) & set(special.values()):
        return None, "an added token is also an ordinary one"
    return tiktoken.Encoding(
        tokenizer.name_or_path or "bulk", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
    ), ""


def _backend_json(tokenizer: PreTrainedTokenizerBase) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}


def _merges(backend: dict) -> list[list[str]]:
    """The pairs of a BPE model; old files write "a b", new ones ["a", "b"]."""
    merges = backend.get("model", {}).get("merges") or []
    return [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in merges]


def _byte_decoder() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: character → byte (`bytes_to_unicode` in OpenAI's encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
