"""What tests build instead of downloading: a trained byte-level BPE tokenizer, and a fast embedding model."""

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import StaticEmbedding
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast


def train_tokenizer(texts, vocab_size):
    """Ids as trained tokenizers commonly have them: end-of-text first, then the bytes, then the merges."""
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


def save_static_embedding(hf_tokenizer, folder, *, dim, seed):
    """A sentence-transformers model with random token vectors; returns its folder."""
    torch.manual_seed(seed)
    embedding = StaticEmbedding(hf_tokenizer.backend_tokenizer, embedding_dim=dim)
    SentenceTransformer(modules=[embedding], device="cpu").save_pretrained(str(folder))
    return folder
