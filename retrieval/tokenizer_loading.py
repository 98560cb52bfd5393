"""Load the tokenizer of any decoder, also from a GGUF file."""

from pathlib import Path

from tokenizers.decoders import ByteLevel
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from .detokenization import is_byte_level


def load_tokenizer(name: str | Path, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    What transformers makes of a GGUF file is corrected: the conversion of a byte-level tokenizer
    has a decoder of another kind, and some conversions take the first token for end-of-text.

    Args:
        name: a Hub name or a folder.
        gguf_file: the name of a GGUF file in it that holds the tokenizer.

    Raises:
        OSError: there is no such tokenizer.
    """
    if gguf_file is None:
        return AutoTokenizer.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name, gguf_file=gguf_file)
    tokenizer.clean_up_tokenization_spaces = False
    if is_byte_level(tokenizer):
        tokenizer.backend_tokenizer.decoder = ByteLevel()
    config = AutoConfig.from_pretrained(name, gguf_file=gguf_file)
    for special in ("bos_token", "eos_token"):
        index = getattr(config, f"{special}_id", None)
        if index is not None:
            setattr(tokenizer, special, tokenizer.convert_ids_to_tokens(index))
    return tokenizer
