"""Small tokenizers and an embedding model, built by tests instead of downloaded."""

import string

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def train_tokenizer(texts, vocab_size):
    """Train a byte-level BPE tokenizer.

    Its ids are in the common order: end-of-text, then the bytes, then the merges.
    """
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False)
    eot = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        eos_token=eot,
        bos_token=eot,
        unk_token=eot,
        clean_up_tokenization_spaces=False,
    )


def letter_tokenizer(vocab_size, **settings):
    """Build a tokenizer of at most 62 letters and digits. The last one pads, on the left."""
    vocab = {character: i for i, character in enumerate((string.ascii_letters + string.digits)[:vocab_size])}
    letters = Tokenizer(models.BPE(vocab, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters.decoder = decoders.ByteLevel()
    last = letters.id_to_token(vocab_size - 1)
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token=last, padding_side="left", **settings)


def save_static_embedding(hf_tokenizer, folder, *, dim, seed):
    """Save a sentence-transformers model with random token vectors and return its folder."""
    torch.manual_seed(seed)
    embedding = StaticEmbedding(hf_tokenizer.backend_tokenizer, embedding_dim=dim)
    SentenceTransformer(modules=[embedding], device="cpu").save_pretrained(str(folder))
    return folder
