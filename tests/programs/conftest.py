"""A saved model with its tokenizer, as other people's programs open it, and text for it to read."""

import string

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..modeling.by_hand import retrieving_model
from ..modeling.conftest import VOCAB, random_tokens


@pytest.fixture(scope="session")
def tokenizer():
    """One letter or digit a token; the last one ends a text and pads."""
    vocab = {character: i for i, character in enumerate((string.ascii_letters + string.digits)[:VOCAB])}
    letters = Tokenizer(models.BPE(vocab, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters.decoder = decoders.ByteLevel()
    last = letters.id_to_token(VOCAB - 1)
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token=last, eos_token=last, padding_side="left")


@pytest.fixture(scope="session")
def saved(tokenizer, tmp_path_factory):
    """The folder of a model that was saved without its retriever, and of its tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    retrieving_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def texts(tokenizer):
    """Texts of 6 to 29 tokens."""
    return tokenizer.batch_decode([random_tokens(length, seed=length) for length in range(6, 30)])
