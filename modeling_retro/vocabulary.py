"""Ids that only pad a model's vocabulary: no token has them, and none is ever generated."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def suppress_padding_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep `generate()` from writing ids that no token of the tokenizer has.

    A vocabulary is often padded to a multiple of 64, which is faster. The ids are added to
    `suppress_tokens` of the model's generation configuration, which is saved with the model.

    Args:
        model: its `vocab_size` may be larger than the tokenizer.
        tokenizer: the model's.
    """
    config = model.generation_config
    assert config is not None, "the model can generate"
    suppressed = set(config.suppress_tokens or ())
    last = model.config.vocab_size - 1
    # earlier padding may be tokens by now; a user may have chosen to suppress end-of-text
    while last in suppressed and last != tokenizer.eos_token_id:
        suppressed.remove(last)
        last -= 1
    suppressed |= set(range(model.config.vocab_size)) - set(tokenizer.get_vocab().values())
    config.suppress_tokens = sorted(suppressed) or None
