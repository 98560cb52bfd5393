"""Bulk tokenization gives the Hugging Face tokenizer's ids, with and without tiktoken."""

import hashlib
import json
import pydoc_data.topics
import random

import pytest
from datasets.fingerprint import Hasher
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PythonBackend

from retrieval import BulkTokenizer, Identity, IdentityMismatch
from retrieval.tokenization import PROBE_TEXT

from ..support.places import CHUNK

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


def test_ids_equal_the_tokenizers_on_hard_text(hf_tokenizer, tokenizer):
    assert tokenizer.uses_tiktoken
    texts = [*HARD, *(random_text(seed) for seed in range(20)), *list(pydoc_data.topics.topics.values())[20:50]]
    expected = [hf_tokenizer(t, add_special_tokens=False, split_special_tokens=True)["input_ids"] for t in texts]
    hf_tokenizer("", split_special_tokens=False)  # the backend remembers it
    assert tokenizer.encode_batch(texts) == expected


def test_other_tokenizers_are_used_themselves(hf_tokenizer):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    lowercase = Tokenizer.from_str(hf_tokenizer.backend_tokenizer.to_str())
    lowercase.normalizer = normalizers.Lowercase()
    for backend in (words, lowercase):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="?")
        bulk = BulkTokenizer(tokenizer)
        assert not bulk.uses_tiktoken
        assert bulk.encode_batch(["a B a"]) == tokenizer(["a B a"], add_special_tokens=False)["input_ids"]


SPECIAL = [
    AddedToken("<|endoftext|>", special=True),
    AddedToken("[MASK]", lstrip=True, special=True),
    AddedToken("</s>", rstrip=True, normalized=True, special=True),
    AddedToken("<pad>", single_word=True, normalized=False, special=True),
    AddedToken("<unk>", special=True),
]
SPELLED = [token.content for token in SPECIAL]
FORMAT_2_HASH = "4e8b9a1ce72dda1f61c1ca39bf2e532059b7ee3c926adf804ff066a1c2348a06"  # of byte_level(SPELLED)


def byte_level(names, **settings):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("<", "/"), ("</", "s"), ("e", "n"), ("Ġ", "a"), ("A", "S")]
    tokens = [*names, *alphabet, *("".join(pair) for pair in pairs)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs, **settings))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def lowercase_byte_level(names):
    tokenizer = byte_level(names)
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def split_at_spaces(names):
    tokenizer = byte_level(names, ignore_merges=True)
    split = pre_tokenizers.Split(" ", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return tokenizer


def pieces(names):
    return [*names, *"<>|/[]abdefkMnopstuxASK ", *(f"##{letter}" for letter in "<>|/[]abdefkMnopstuxASK"), "##end"]


def word_pieces(names):
    vocabulary = {piece: i for i, piece in enumerate(pieces(names))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=names[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def whole_words(names):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*names, "a", "b"])}, unk_token=names[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def unigram(names):
    scored = [
        *((name, 0.0) for name in names),
        ("▁", -2.0),
        ("</", -4.0),
        *((piece, -3.0) for piece in "<>/[]|abdentoxs"),
    ]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=len(names) - 1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


KINDS = [byte_level, lowercase_byte_level, split_at_spaces, word_pieces, whole_words, unigram]


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_a_special_token_is_ordinary_text(kind):
    """The truth is a tokenizer whose special tokens have names that no text contains."""
    backend, twin = kind(SPELLED), kind([f"special token {i}" for i in range(len(SPECIAL))])
    backend.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<pad>")
    assert [backend.token_to_id(name) for name in SPELLED] == list(range(len(SPECIAL)))
    forms = ("{}", "a{}b", " {} ", "a  {}  b", "{0}{0}", "{}.")
    texts = [form.format(name) for name in SPELLED for form in forms]
    texts += ["".join(SPELLED), " ".join(SPELLED), "<|endoftext|", "< pad >", "a b", "", PROBE_TEXT]
    bulk = BulkTokenizer(tokenizer)
    assert bulk.uses_tiktoken == (kind is byte_level)
    ids = bulk.encode_batch(texts)
    assert ids == [encoding.ids for encoding in twin.encode_batch(texts)]
    assert {index for row in ids for index in row} & set(
        range(len(SPECIAL) - 1)
    ) == set()  # the last one is for the unknown
    assert bulk._encode_hf(texts) == ids
    assert 0 in tokenizer("a<|endoftext|>b")["input_ids"]  # a prompt may still have special tokens


def test_special_tokens_are_left_out_of_a_text(hf_tokenizer):
    """End-of-text, and the turns of a chat; other ids decode as always."""
    turn, pad = AddedToken("<|im_start|>", special=True), AddedToken("<pad>", special=True)
    bulk = with_tokens(hf_tokenizer, turn, pad)
    special = ["<|endoftext|>", "<|im_start|>", "<pad>"]
    end, start, padding = bulk.hf_tokenizer.convert_tokens_to_ids(special)
    (words,) = bulk.encode_batch(["a text that spells <|im_start|> and <|endoftext|>"])
    chat = [end, start, *words[:4], padding, *words[4:], start]
    assert bulk.decode_text(chat) == bulk.decode(words) == "a text that spells <|im_start|> and <|endoftext|>"
    assert bulk.decode_text([start, padding]) == bulk.decode_text([]) == ""


def test_an_ordinary_token_declared_special_stays_ordinary():
    """The text of a letter used for padding, for example, has no other token."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level([]), pad_token="n", sep_token="en", cls_token="<cls>"
    )
    texts = ["when an enemy", "n en <cls>"]
    expected = [encoding.ids for encoding in byte_level([]).encode_batch(texts)]
    assert BulkTokenizer(tokenizer).encode_batch(texts) == expected
    assert (
        BulkTokenizer(tokenizer).fingerprint
        == BulkTokenizer(PreTrainedTokenizerFast(tokenizer_object=byte_level([]))).fingerprint
    )


class Words(PythonBackend):
    """A tokenizer in Python. A special token may be a word of its own vocabulary."""

    def __init__(self, words, **settings):
        self.words = {word: i for i, word in enumerate(words)}
        super().__init__(**settings)

    vocab_size = property(lambda self: len(self.words))

    def get_vocab(self):
        return self.words | self.added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        return text.split()

    def _convert_token_to_id(self, token):
        return self.words.get(token, 0)

    def _convert_id_to_token(self, index):
        return list(self.words)[index]


def test_a_slow_tokenizer_that_parses_special_tokens_is_refused():
    words = ["?", "a", "b", "<end>"]
    bulk = BulkTokenizer(Words(words, unk_token="?", eos_token="<end>"))
    assert bulk.encode_batch(["a b c"]) == [[1, 2, 0]]
    with pytest.raises(ValueError, match="turns text into its special token '<end>'. Use its fast version"):
        bulk.encode_batch(["a", "b <end> a"])


def with_tokens(hf_tokenizer, *tokens):
    again = PreTrainedTokenizerFast(tokenizer_object=hf_tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    again = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(again.backend_tokenizer.to_str()))
    again.add_tokens(list(tokens))
    return BulkTokenizer(again)


def test_a_fingerprint_does_not_depend_on_the_folder(tokenizer, tokenizer_folder):
    again = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    assert BulkTokenizer(again).fingerprint == tokenizer.fingerprint


def test_pickles_of_one_tokenizer_are_equal(tokenizer_folder, monkeypatch):
    """`datasets` compares pickles, across processes and after use."""
    hashes = set()
    for mark in ("first", "second"):
        monkeypatch.setattr("retrieval.tokenization.MARK", mark)
        bulk = BulkTokenizer(PreTrainedTokenizerFast.from_pretrained(tokenizer_folder))
        hashes.add(Hasher.hash(bulk))
        assert bulk.fingerprint and bulk.encode_batch(["a text"])
        hashes.add(Hasher.hash(bulk))
    assert len(hashes) == 1


class TestAddedTokens:
    """A knowledge base takes exactly the tokenizers that give all text the same ids."""

    PAD = AddedToken("<pad>", special=True)

    def test_special_tokens_may_come_and_go(self, hf_tokenizer, tokenizer, embedder):
        more = with_tokens(hf_tokenizer, self.PAD, AddedToken("the", special=True), AddedToken("[MASK]", special=True))
        assert len(more.hf_tokenizer) == len(hf_tokenizer) + 2  # "the" was an ordinary token already
        Identity.of(tokenizer, embedder, CHUNK).check("kb", tokenizer=more)
        Identity.of(more, embedder, CHUNK).check("kb", tokenizer=tokenizer)
        assert Identity.of(more, embedder, CHUNK).vocab_size == tokenizer.vocab_size
        assert more.encode_batch(["<pad> in the [MASK]"]) == tokenizer.encode_batch(["<pad> in the [MASK]"])

    def test_the_name_of_a_special_token_does_not_matter(self, embedder):
        one, other = (byte_level([name]) for name in ("<|endoftext|>", "</s>"))
        one, other = (
            BulkTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=name))
            for backend, name in ((one, "<|endoftext|>"), (other, "</s>"))
        )
        Identity.of(one, embedder, CHUNK).check("kb", tokenizer=other)
        assert one.encode_batch(["<|endoftext|></s>"]) == other.encode_batch(["<|endoftext|></s>"])

    @pytest.mark.parametrize("token", ["<new>", AddedToken("<new>", lstrip=True), "Python", AddedToken("[MASK]")])
    def test_added_tokens_that_split_text_are_refused(self, hf_tokenizer, tokenizer, embedder, token):
        more = with_tokens(hf_tokenizer, token)
        assert more.encode_batch([f"a {token} b"]) != tokenizer.encode_batch([f"a {token} b"])
        for built, used in ((tokenizer, more), (more, tokenizer)):
            with pytest.raises(IdentityMismatch, match="its tokenizer is"):
                Identity.of(built, embedder, CHUNK).check("kb", tokenizer=used)
        stripping = with_tokens(hf_tokenizer, AddedToken(str(token), rstrip=True))
        assert stripping.fingerprint != more.fingerprint

    @pytest.mark.parametrize("change", ["vocabulary", "merges", "scores", "unknown"])
    def test_changed_models_have_another_fingerprint(self, change):
        names, other = ["<unk>", "<|endoftext|>"], ["<unk>", "<|endoftext|>"]
        kind = {"scores": unigram, "unknown": word_pieces}.get(change, byte_level)
        backend = kind(other)
        card = json.loads(backend.to_str())
        if change == "vocabulary":
            vocabulary = card["model"]["vocab"]
            vocabulary["Z"], vocabulary["Y"] = vocabulary["Y"], vocabulary["Z"]
        elif change == "merges":
            card["model"]["merges"].reverse()
        elif change == "scores":
            card["model"]["vocab"][-1][1] = -30.0
        else:
            card["model"]["unk_token"] = "a"
        one, changed = (
            BulkTokenizer(PreTrainedTokenizerFast(tokenizer_object=b, eos_token="<|endoftext|>"))
            for b in (kind(names), Tokenizer.from_str(json.dumps(card)))
        )
        assert one.fingerprint != changed.fingerprint


class TestFormat2:
    """Identities of format 2, which parsed and counted special tokens in texts."""

    @staticmethod
    def stored(hf_tokenizer, embedder):
        """Return the identity as format 2 stored it."""
        probe = hf_tokenizer([PROBE_TEXT], add_special_tokens=False)["input_ids"][0]
        merges = [list(m) for m in json.loads(hf_tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
        vocabulary = sorted(hf_tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
        content = {"vocabulary": vocabulary, "merges": merges, "probe": probe}
        print_ = hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
        fields = json.loads(Identity.of(BulkTokenizer(hf_tokenizer), embedder, CHUNK).to_json())
        fields |= {"tokenizer_fingerprint": print_, "vocab_size": len(hf_tokenizer), "format_version": 2}
        return Identity.from_json(json.dumps(fields), "kb")

    def test_a_known_tokenizer_keeps_its_hash(self, embedder):
        """The expected hash comes from the last version with this format."""
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(SPELLED), eos_token="<|endoftext|>")
        assert self.stored(tokenizer, embedder).tokenizer_fingerprint == FORMAT_2_HASH

    def test_the_same_tokenizer_with_or_without_more_special_tokens_fits(self, hf_tokenizer, tokenizer, embedder):
        stored = self.stored(hf_tokenizer, embedder)
        assert 0 in hf_tokenizer(PROBE_TEXT)["input_ids"]
        stored.check("kb", tokenizer=tokenizer)
        later = [AddedToken("<pad>", special=True), AddedToken("[MASK]", special=True)]
        stored.check("kb", tokenizer=with_tokens(hf_tokenizer, *later))
        assert stored.vocab_size == len(hf_tokenizer)

    def test_other_tokenizers_do_not_fit(self, hf_tokenizer, embedder):
        stored = self.stored(hf_tokenizer, embedder)
        splitting, fewer = (
            with_tokens(hf_tokenizer, "<new>"),
            self.stored(with_tokens(hf_tokenizer, "<x>").hf_tokenizer, embedder),
        )
        other = BulkTokenizer(PreTrainedTokenizerFast(tokenizer_object=byte_level([]), eos_token="<|endoftext|>"))
        for identity, used in ((stored, splitting), (stored, other), (fewer, with_tokens(hf_tokenizer))):
            with pytest.raises(IdentityMismatch):
                identity.check("kb", tokenizer=used)


@pytest.mark.parametrize("text", HARD)
def test_decoding_gives_the_text_back(tokenizer, text):
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
