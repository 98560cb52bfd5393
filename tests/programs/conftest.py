"""A saved model with its tokenizer, as other people's programs open it, and text for it to read."""

import pytest

from ..support.by_hand import retrieving_model
from ..support.retro_models import VOCAB, random_tokens
from ..support.small_models import letter_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer whose padding token also ends a text."""
    return letter_tokenizer(VOCAB, eos_token=letter_tokenizer(VOCAB).pad_token)


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
