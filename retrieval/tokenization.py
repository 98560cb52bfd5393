"""Bulk tokenization with a Hugging Face tokenizer's ids.

tiktoken does the work where it provably gives the same ids.
"""

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby

import tiktoken
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from .detokenization import TokenBytes, backend_json, byte_decoder, puts_space_before, token_bytes
from .labels import short_name

logger = logging.getLogger(__name__)

# The regular expression of `ByteLevel` pre-tokenization (GPT-2's), copied from `tokenizers`.
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

# Text on which tokenizers differ. All its characters are in Unicode 6.0 and later: its ids are
# part of the fingerprint, which must not change with a library's version.
PROBE_TEXT = (
    "It's we'LL don't I'd've 'tis 3.14159 1,000,000 x=[0]*64;\tif a<=b:\r\n\r\n    return f\"{a!r}\"  \n\n\n   end   \n"
    " e\u0301 \u00e9 na\u00efve \u0416\u0443\u043a \u6f22\u5b57 \u0e44\u0e17\u0e22 \u0645\u0631\u062d\u0628\u0627 "
    "\u200b\u200d\u00a0\u2003\u3000\ufeff \U0001f469\u200d\U0001f4bb \U0001f600\u2665\ufe0f \u2167\u00bd\u0967 "
    "<|endoftext|> </s>[MASK] \x00\x07\x1b\x7f\u0085 aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ________________ ....!?"
)

NO_NORMALIZER = {"type": "Sequence", "normalizers": []}  # as conversions of GGUF files write it

# Appended to the names of special tokens, so that no text contains them. It is random, so that
# nobody can write it into a text.
MARK = "\U0010ffff" + secrets.token_hex(8)


class BulkTokenizer:
    """Encode text as ordinary tokens, several times faster in bulk than the tokenizer itself.

    Text is data: a text that spells a special token, such as "<|endoftext|>", becomes the ordinary
    tokens of its letters. For all other text the ids equal those of
    `tokenizer(text, add_special_tokens=False)`.

    tiktoken encodes if the tokenizer is a byte-level BPE with GPT-2's regular expression and with
    merges in the order of their ids. Otherwise, or if both give different ids for a probe text,
    the Hugging Face tokenizer encodes.

    Args:
        hf_tokenizer: any `transformers` tokenizer.

    Attributes:
        vocab_size: every id that text can become is below this.
        eos_token_id: the end-of-text token, which separates documents; None if it has none.
        bos_token_id: the token that the tokenizer puts before each text; None if it puts none.

    Raises:
        ValueError: the tokenizer turns the text of a special token into that token, and nothing
            can stop it. Encoding raises this, too.
    """

    def __init__(self, hf_tokenizer: PreTrainedTokenizerBase) -> None:
        self.hf_tokenizer = hf_tokenizer
        self.name = short_name(hf_tokenizer.name_or_path or type(hf_tokenizer).__name__)
        self.eos_token_id: int | None = hf_tokenizer.eos_token_id
        self.bos_token_id = added_bos(hf_tokenizer)
        backend = backend_json(hf_tokenizer)
        self._reserved = reserved_tokens(hf_tokenizer, backend)
        self._unknown_id: int | None = _unknown_id(backend) if backend else hf_tokenizer.unk_token_id
        self.vocab_size = 1 + max([*self._ordinary_vocabulary().values(), self._unknown_id or 0])
        self._adds_space = puts_space_before(backend)
        self._backend: Tokenizer | None = None
        self._encoding: tiktoken.Encoding | None = None
        reason = "it has no backend that takes all text as data"
        if backend and self._agrees(text_backend := Tokenizer.from_str(_text_json(backend, self._reserved))):
            self._backend = text_backend
            self._encoding, reason = tiktoken_encoding(text_backend, self.name)
        probe = self._encode_hf([PROBE_TEXT])
        if self._encoding is not None and self._encode_tiktoken(self._encoding, [PROBE_TEXT]) != probe:
            self._encoding, reason = None, "their ids for the probe text differ"
        if self._encoding is None:
            logger.info("Tokenizing with %s itself, not with tiktoken: %s.", self.name, reason)

    def __reduce__(self) -> tuple:
        # MARK differs between processes, and caches compare pickles
        return type(self), (self.hf_tokenizer,)

    @property
    def uses_tiktoken(self) -> bool:
        """Return True if tiktoken does the encoding."""
        return self._encoding is not None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens around or inside it."""
        return self._encode_hf(texts) if self._encoding is None else self._encode_tiktoken(self._encoding, texts)

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes that each token stands for.

        Raises:
            ValueError: its tokens do not tell where the text has spaces, as those of WordPiece.
        """
        return token_bytes(self.hf_tokenizer)

    def check_keeps_text(self) -> None:
        """Raise ValueError if its tokens do not tell where a text has spaces (WordPiece)."""
        self.token_bytes  # noqa: B018  it checks the tokenizer

    def encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts that continue another one.

        Where the tokenizer puts a space before each text, a text's own first space is its place.
        """
        return self.encode_batch([text.removeprefix(" ") if self._adds_space else text for text in texts])

    def decode_bytes(self, tokens: Sequence[int], starts_text: bool = True) -> bytes:
        """Return the UTF-8 text of token ids. The bytes of chunks, joined, are their document's.

        Args:
            starts_text: the tokens begin a text. Some tokenizers put a space before each text; it
                is left out here. Set it to False for all chunks of a document but the first.

        Raises:
            ValueError: the tokenizer's tokens do not tell where the text has spaces.
        """
        return self.token_bytes.join(tokens, starts_text)

    def decode(self, tokens: Sequence[int], starts_text: bool = True) -> str:
        """Return the text of token ids. A character cut in half at either end becomes U+FFFD.

        Args:
            starts_text: see [`decode_bytes`].
        """
        return self.decode_bytes(tokens, starts_text).decode(errors="replace")

    def decode_text(self, tokens: Sequence[int]) -> str:
        """Return the text to embed: without special tokens, such as end-of-text.

        Equal tokens have equal texts here, wherever they stand in a document. So where the
        tokenizer puts a space before each text, the first space is left out, and the one behind
        each special token.
        """
        special = self._reserved.keys() - {self._unknown_id}
        texts = [list(text) for is_special, text in groupby(tokens, special.__contains__) if not is_special]
        return b"".join(map(self.decode_bytes, texts)).decode(errors="replace")

    @cached_property
    def fingerprint(self) -> str:
        """The hash (hex) of everything that decides which ids a text becomes.

        Tokenizers that give every text the same ids have the same hash. Their folder and the
        libraries' versions do not matter, nor do special tokens, since no text becomes one.
        """
        backend = backend_json(self.hf_tokenizer)
        scores = enumerate(backend["model"]["vocab"]) if _is_unigram(backend) else ()
        content = {
            "vocabulary": _by_id(self._ordinary_vocabulary()),
            "scores": [score for index, (_, score) in scores if index not in self._reserved],
            "merges": _merges(backend),
            "unknown": self._unknown_id,
            "splits": [
                [index, token.content, token.single_word, token.lstrip, token.rstrip, token.normalized]
                for index, token in sorted(self.hf_tokenizer.added_tokens_decoder.items())
                if not token.special
            ],
            "probe": self._encode_hf([PROBE_TEXT])[0],
        }
        return _hash(content)

    def whole_fingerprint(self, vocab_size: int) -> str | None:
        """Return format 2's fingerprint: the hash (hex) of the first `vocab_size` ids.

        It counts special tokens, too. See [`Identity.fits`].

        Returns:
            The hash, or None if there are fewer ids, or if later ids are not all special tokens.
        """
        vocabulary = self.hf_tokenizer.get_vocab()
        later: dict[int, str] = {}
        if vocab_size != len(vocabulary):
            later = {index: token for token, index in vocabulary.items() if index >= vocab_size}
            if len(vocabulary) - len(later) != vocab_size or not later.keys() <= self._reserved.keys():
                return None
        backend = backend_json(self.hf_tokenizer)
        if not later:
            probe = self.hf_tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"]
        elif backend:
            earlier = Tokenizer.from_str(json.dumps(_renamed(backend, later)))
            probe = earlier.encode(PROBE_TEXT, add_special_tokens=False).ids
        else:
            return None
        kept = {token: index for token, index in vocabulary.items() if index not in later}
        return _hash({"vocabulary": _by_id(kept), "merges": _merges(backend), "probe": probe})

    def _ordinary_vocabulary(self) -> dict[str, int]:
        return {token: index for token, index in self.hf_tokenizer.get_vocab().items() if index not in self._reserved}

    def _agrees(self, backend: Tokenizer) -> bool:
        """Return False if ids have moved or the tokenizer's Python class changes them."""
        added = self.hf_tokenizer.added_tokens_decoder
        if any(
            backend.id_to_token(index) not in (token.content, _marked(token.content)) for index, token in added.items()
        ):
            return False
        text = PROBE_TEXT
        for token in added.values():
            text = text.replace(token.content, " ") if token.special else text
        expected = self.hf_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return backend.encode(text, add_special_tokens=False).ids == expected

    def _encode_tiktoken(self, encoding: tiktoken.Encoding, texts: Sequence[str]) -> list[list[int]]:
        try:
            return encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)
        except Exception as error:  # for example, its regular expressions fail on a million spaces
            logger.debug("tiktoken failed on a batch (%s). Using %s itself.", error, self.name)
            return self._encode_hf(texts)

    def _encode_hf(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._backend is not None:
            return [encoded.ids for encoded in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        settings = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        batch = self.hf_tokenizer(list(texts), **settings)["input_ids"]
        for ids in batch:
            for index in (self._reserved.keys() & ids) - {self._unknown_id}:
                raise ValueError(
                    f"The tokenizer {self.name} turns text into its special token {self._reserved[index]!r}. Use its "
                    "fast version, which takes all text as data."
                )
        return batch


def added_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the beginning-of-text token if the tokenizer puts it before each text, else None."""
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else None


def reserved_tokens(tokenizer: PreTrainedTokenizerBase, backend: dict) -> dict[int, str]:
    """Return the special tokens that no text may become, by their ids.

    An ordinary token that was declared special, such as a letter used for padding, is left out:
    its text has no other token.

    Args:
        backend: the tokenizer's JSON; empty for a slow tokenizer.
    """
    vocabulary = _vocabulary(backend) if backend else {}
    merged = {left + right for left, right in _merges(backend)}

    def is_ordinary(index: int, content: str) -> bool:
        if backend:
            return vocabulary.get(content) == index and (len(content) == 1 or content in merged)
        return index < tokenizer.vocab_size and len(content) == 1

    added = tokenizer.added_tokens_decoder.items()
    return {index: t.content for index, t in added if t.special and not is_ordinary(index, t.content)}


def tiktoken_encoding(tokenizer: Tokenizer, name: str) -> tuple[tiktoken.Encoding | None, str]:
    """Build a tiktoken encoding equal to `tokenizer`, without a network.

    tiktoken merges two neighbors if their bytes together are a token, lowest id first. Hugging
    Face merges pairs in the order of its list of merges. Both give the same ids if the results
    of the merges have rising ids and every token, encoded on its own, stays one token.

    Returns:
        The encoding and "", or None and the reason why there is none.
    """
    backend = json.loads(tokenizer.to_str())
    if reason := _unlike_gpt2(backend):
        return None, reason
    vocabulary: dict[str, int] = backend["model"]["vocab"]
    byte_of = byte_decoder()
    merged = [left + right for left, right in _merges(backend)]
    if not all(character in vocabulary for character in byte_of):
        return None, "some single bytes are not in its vocabulary"
    if any(token not in vocabulary for token in merged):
        return None, "some merges are not in its vocabulary"
    ids = [vocabulary[token] for token in merged]
    if any(second <= first for first, second in zip(ids, ids[1:], strict=False)):
        return None, "its merges are not in the order of their ids"
    if set(vocabulary) - set(merged) - set(byte_of) - {token["content"] for token in backend["added_tokens"]}:
        return None, "some tokens of its vocabulary come from no merge"
    if any(len(tokenizer.model.tokenize(token)) != 1 for token in merged):
        return None, "some of its tokens do not stay one token when encoded"

    ranks = {bytes(map(byte_of.__getitem__, token)): vocabulary[token] for token in [*byte_of, *merged]}
    if len(ranks) != len(byte_of) + len(merged):
        return None, "two of its tokens have the same bytes"
    return tiktoken.Encoding(name or "bulk", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}), ""


def _unlike_gpt2(backend: dict) -> str:
    """Return a difference from GPT-2's algorithm, or "" if there is none."""
    model = backend["model"]
    if model["type"] != "BPE":
        return f"its model is {model['type']}, not BPE"
    # byte fallback has no effect where each byte has a token, which is checked later
    if any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        return "its BPE has dropout, a prefix or a suffix"
    if model.get("ignore_merges") or backend.get("normalizer") not in (None, NO_NORMALIZER):
        return "it ignores merges or normalizes text"
    pre = backend.get("pre_tokenizer") or {}
    if pre.get("type") != "ByteLevel" or pre.get("add_prefix_space") or not pre.get("use_regex", True):
        return "its pre-tokenizer is not GPT-2's"
    if not all(token["special"] for token in backend["added_tokens"]):
        return "it has added tokens that split text"
    return ""


def _text_json(backend: dict, reserved: dict[int, str]) -> str:
    """Return the JSON of a backend that takes all text as data. Ids do not change."""
    backend = _renamed(backend, reserved)
    kept = [token for token in backend["added_tokens"] if token["id"] in reserved or not token["special"]]
    return json.dumps(backend | {"added_tokens": kept, "post_processor": None, "truncation": None, "padding": None})


def _renamed(backend: dict, tokens: dict[int, str]) -> dict:
    """Return a backend whose `tokens` have names that no text contains.

    They are renamed among the added tokens and in the model: Unigram and whole-word models would
    otherwise find them in their own vocabulary.
    """
    model = dict(backend["model"])
    if _is_unigram(backend):
        model["vocab"] = [[_marked(p) if n in tokens else p, score] for n, (p, score) in enumerate(model["vocab"])]
    else:
        model["vocab"] = {_marked(p) if n in tokens else p: n for p, n in model["vocab"].items()}
        unknown = model.get("unk_token")
        if unknown is not None and unknown in tokens.values():
            model["unk_token"] = _marked(unknown)
    added = [t | {"content": _marked(t["content"])} if t["id"] in tokens else t for t in backend["added_tokens"]]
    return backend | {"model": model, "added_tokens": added, "post_processor": None}


def _marked(token: str) -> str:
    return token + MARK


def _is_unigram(backend: dict) -> bool:
    return backend.get("model", {}).get("type") == "Unigram"


def _vocabulary(backend: dict) -> dict[str, int]:
    vocabulary = backend["model"]["vocab"]
    return {piece: n for n, (piece, _) in enumerate(vocabulary)} if _is_unigram(backend) else vocabulary


def _unknown_id(backend: dict) -> int | None:
    model = backend["model"]
    return model.get("unk_id") if _is_unigram(backend) else model["vocab"].get(model.get("unk_token"))


def _by_id(vocabulary: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(vocabulary.items(), key=lambda item: (item[1], item[0]))


def _hash(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def _merges(backend: dict) -> list[list[str]]:
    """Return the pairs of a BPE model. Old files write "a b", new ones ["a", "b"]."""
    merges = backend.get("model", {}).get("merges") or []
    return [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in merges]
