"""Texts survive tokenization, chunking and decoding, whatever the tokenizer."""

import functools
import pydoc_data.topics

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from retrieval import BulkTokenizer, Document, Identity, chunk_documents
from retrieval.detokenization import token_bytes
from retrieval.tokenizer_loading import load_tokenizer

from ..support import real_tokenizers
from ..support.small_models import train_byte_fallback_bpe, train_llama_tokenizer, train_tokenizer
from .test_tokenization import Words, whole_words, word_pieces

SPACE = "\u2581"  # what sentencepiece writes for a space: it cannot tell both apart
TEXTS = list(pydoc_data.topics.topics.values())[:20]
ADDED = [
    AddedToken("<new>", normalized=False),
    AddedToken("<set>", normalized=True),
    AddedToken("  ", normalized=False),
]


def prepending_bpe():
    """Like Llama's first tokenizers."""
    return train_llama_tokenizer(TEXTS, 900)


def bpe_without_prefix():
    """Like Gemma's tokenizer."""
    parts = {"normalizer": normalizers.Replace(" ", SPACE), "decoder": decoders.Replace(SPACE, " ")}
    return train_byte_fallback_bpe(TEXTS, 900, **parts)


def first_prefix_bpe():
    """Like Llama's tokenizer with `legacy=False`."""
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    decoder = decoders.Metaspace(prepend_scheme="first")
    return train_byte_fallback_bpe(TEXTS, 900, pre_tokenizer=metaspace, decoder=decoder)


def unigram_metaspace():
    """Like ALBERT's tokenizer; no byte fallback."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    names = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=names, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_level():
    return train_tokenizer(TEXTS, 700)


def byte_level_prefix():
    """Like RoBERTa's tokenizer with `add_prefix_space`."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def byte_level_of_gguf():
    """Like the conversion of a GGUF file, whose decoder fits another kind of tokenizer."""
    tokenizer = byte_level()
    parts = [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace(SPACE, " "), decoders.ByteLevel()]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def with_added(make):
    @functools.wraps(make)
    def made():
        tokenizer = make()
        tokenizer.add_tokens(ADDED)
        return tokenizer

    made.__name__ = f"{make.__name__}_with_added_tokens"
    return made


EXACT = [
    real_tokenizers.llama_2,
    real_tokenizers.without_prefix,
    real_tokenizers.gemma,
    prepending_bpe,
    bpe_without_prefix,
    byte_level,
    byte_level_of_gguf,
]
DROPS_FIRST_SPACE = [real_tokenizers.mistral, first_prefix_bpe, byte_level_prefix]
LOSSLESS = [*EXACT, *DROPS_FIRST_SPACE]
WITH_ADDED = [with_added(make) for make in (*EXACT, real_tokenizers.mistral, first_prefix_bpe)]


@functools.cache
def bulk(make):
    return BulkTokenizer(make())


word = st.sampled_from(
    ["the", "naïve", "Ελλάδα", "漢字", "👩‍💻", "<0x41>", "</s>", "<unk>", "x=1;", "don't", "e\u0301"]
)
space = st.sampled_from([" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "   \n ", ""])
added = st.sampled_from([token.content for token in ADDED])
mixed = st.lists(word | space | st.text(st.characters(codec="utf-8"), max_size=6), max_size=12).map("".join)
mixed_with_added = st.lists(word | space | added, max_size=12).map("".join)
unhurried = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def chunks_of(tokenizer, text, size):
    return list(chunk_documents([Document("one", text)], tokenizer, size))


def check_chunks(tokenizer, text, size):
    """Check that a text's chunks, decoded one by one, give the text."""
    chunks = chunks_of(tokenizer, text, size)
    ids = [token for chunk in chunks for token in chunk.tokens]
    assert tokenizer.encode_batch([text]) == [ids]
    restarts = tokenizer.token_bytes.restarts
    parts = []
    for chunk in chunks:
        starts_text = chunk.index == 0 or chunks[chunk.index - 1].tokens[-1] in restarts
        parts.append(tokenizer.decode_bytes(chunk.tokens, starts_text))
    assert b"".join(parts).decode() == text
    assert tokenizer.decode(ids) == text
    if len(chunks) <= 1:
        assert tokenizer.decode_text(ids) == text


@pytest.mark.parametrize("make", LOSSLESS, ids=lambda make: make.__name__)
@unhurried
@given(text=mixed, size=st.integers(1, 9))
@example(text="a", size=1)
@example(text=" ", size=1)
@example(text="two  words\n and </s> 漢字 ", size=1)
def test_chunks_give_the_text_back(make, text, size):
    assume(SPACE not in text)
    if make in DROPS_FIRST_SPACE:
        text = text.lstrip()  # they cannot tell a first space from none
    check_chunks(bulk(make), text, size)


@pytest.mark.parametrize("make", WITH_ADDED, ids=lambda make: make.__name__)
@unhurried
@given(text=mixed_with_added, size=st.integers(1, 5))
@example(text="a<new>b<set>c <new> <set> d", size=1)
def test_chunks_with_added_tokens_give_the_text_back(make, text, size):
    check_chunks(bulk(make), text.lstrip() if "first" in make.__name__ or "mistral" in make.__name__ else text, size)


@pytest.mark.parametrize(
    "make",
    [unigram_metaspace, real_tokenizers.xlm_roberta, real_tokenizers.jurassic],
    ids=lambda make: make.__name__,
)
@unhurried
@given(text=mixed, size=st.integers(1, 9))
def test_chunks_give_back_what_a_tokenizer_without_byte_fallback_knows(make, text, size):
    """The truth is its own decoder, on the whole text."""
    tokenizer = bulk(make)
    ids = tokenizer.encode_batch([text])[0]
    chunks = chunks_of(tokenizer, text, size)
    assert [token for chunk in chunks for token in chunk.tokens] == ids
    parts = [tokenizer.decode(chunk.tokens, starts_text=chunk.index == 0) for chunk in chunks]
    assert "".join(parts) == tokenizer.hf_tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("make", LOSSLESS, ids=lambda make: make.__name__)
def test_real_text_and_its_bytes(make):
    tokenizer = bulk(make)
    for text in TEXTS[:3]:
        check_chunks(tokenizer, text.lstrip(), 64)
        (ids,) = tokenizer.encode_batch([text.lstrip()])
        pieces = tokenizer.token_bytes.pieces
        assert sum(len(pieces[token]) for token in ids) - len(text.lstrip().encode()) in (0, 1)  # the added space


@pytest.mark.parametrize("make", LOSSLESS, ids=lambda make: make.__name__)
def test_a_query_is_the_text(make):
    """Special tokens around it do not count, and the tokenizer's own space does not, either."""
    tokenizer = bulk(make)
    text = "What does a neighbor hold? Its 64 tokens — naïve."
    ids = tokenizer.hf_tokenizer(text)["input_ids"]
    assert tokenizer.decode_text(ids) == tokenizer.decode_text(tokenizer.encode_batch([text])[0]) == text
    end = tokenizer.hf_tokenizer.eos_token_id
    assert tokenizer.decode_text([*ids, end, *ids]) == text + text


def test_bytes_of_a_byte_token_and_a_space():
    pieces, tokenizer = token_bytes(real_tokenizers.llama_2()).pieces, real_tokenizers.llama_2()
    by_name = {name: pieces[index] for name, index in tokenizer.get_vocab().items()}
    assert by_name["<0x0A>"] == b"\n" and by_name["<0xE6>"] == b"\xe6"
    assert by_name[SPACE] == b" " and by_name[f"{SPACE}the"] == b" the" and by_name["é"] == "é".encode()


@pytest.mark.parametrize("kind", [word_pieces, whole_words])
def test_tokenizers_that_lose_spaces_are_refused(kind, embedder):
    tokenizer = BulkTokenizer(PreTrainedTokenizerFast(tokenizer_object=kind(["<unk>"]), unk_token="<unk>"))
    for use in (
        lambda: tokenizer.decode([0]),
        lambda: next(chunk_documents([], tokenizer, 8)),
        lambda: Identity.of(tokenizer, embedder, 8),
    ):
        with pytest.raises(ValueError, match="loses text: its model is Word.*Use a decoder whose tokenizer is"):
            use()


def test_a_slow_tokenizer_that_loses_spaces_is_refused():
    words = Words(["?", "It", "reads", "two"], unk_token="?")
    with pytest.raises(ValueError, match="loses text: the tokens of 'It reads"):
        token_bytes(words)


def test_the_tokenizer_of_a_gguf_file():
    """SmolLM2's; the file says which token ends a text, and decoding gives texts back."""
    folder, file = real_tokenizers.smollm2()
    tokenizer = load_tokenizer(folder, file)
    special = [tokenizer.convert_ids_to_tokens(index) for index in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    assert special == ["<|im_start|>", "<|im_end|>"]
    bulk_tokenizer = BulkTokenizer(tokenizer)
    for text in [*TEXTS[:3], "naïve 漢字 <|im_end|> ▁ 12\u00a0345"]:
        check_chunks(bulk_tokenizer, text, 7)
        assert tokenizer.decode(tokenizer(text, split_special_tokens=True)["input_ids"]) == text
