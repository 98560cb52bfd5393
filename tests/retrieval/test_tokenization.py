"""Bulk tokenization equals the Hugging Face tokenizer token for token, by tiktoken or without it."""

import pydoc_data.topics
import random

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from retrieval import BulkTokenizer

HARD = [
    "",
    " ",
    "\n\n \t\r\n  x  \u00a0\u2003\u3000y ",
    "It's we'LL I'd've 'tis  don't",
    "a<|endoftext|>b<|endoftext|><|endoftext|> <|endof text|>",
    "e\u0301 é ﬁ ½ ² Ⅷ ١٢٣ ४५",
    "👩‍💻👨‍👩‍👧‍👦🏳️‍🌈 🇩🇪 \u200d\u200b\ufeff",
    "漢字かな交じり文 ภาษาไทย مرحبا שלום नमस्ते",
    "a" * 5000 + " " * 3000 + "\n" * 500 + "-" * 2000,
    "\x00\x01\x7f\x85\u2028\u2029",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010fffd \ue000",
]


def random_text(seed):
    rng = random.Random(seed)
    points = [rng.choice((rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x10FFFF))) for _ in range(400)]
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


def test_equals_the_tokenizer_on_hard_text(hf_tokenizer, tokenizer):
    assert tokenizer.uses_tiktoken
    texts = [*HARD, *(random_text(seed) for seed in range(20)), *list(pydoc_data.topics.topics.values())[20:50]]
    expected = [hf_tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert tokenizer.encode_batch(texts) == expected


def test_falls_back_where_it_is_not_plain_byte_level_bpe(hf_tokenizer):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    lowercase = Tokenizer.from_str(hf_tokenizer.backend_tokenizer.to_str())
    lowercase.normalizer = normalizers.Lowercase()
    for backend in (words, lowercase):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="?")
        bulk = BulkTokenizer(tokenizer)
        assert not bulk.uses_tiktoken
        assert bulk.encode_batch(["a B a"]) == tokenizer(["a B a"], add_special_tokens=False)["input_ids"]


def test_the_fingerprint_is_the_tokenizers_and_not_its_places(hf_tokenizer, tokenizer, tokenizer_folder):
    again = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    assert BulkTokenizer(again).fingerprint == tokenizer.fingerprint
    again.add_tokens(["<new>"])
    assert BulkTokenizer(again).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("text", HARD)
def test_decoding_gives_the_text_back(tokenizer, text):
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
