"""Small tokenizers, embedding models and cross-encoders, built by tests instead of downloaded."""

import json
import string

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from tokenizers import (
    ByteLevelBPETokenizer,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast


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


def train_byte_fallback_bpe(texts, vocab_size, *, split=None, **parts):
    """Train a BPE like sentencepiece's, which spells rare characters in bytes.

    It puts <s> before a text.

    Args:
        split: a pre-tokenizer for training alone.
        parts: the tokenizer's normalizer, pre_tokenizer and decoder.
    """
    names, every_byte = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    for name, part in parts.items():
        setattr(backend, name, part)
    if split is not None:
        backend.pre_tokenizer = split
    settings = {"special_tokens": [*names, *every_byte], "show_progress": False, "limit_alphabet": 60}
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, **settings))
    card = json.loads(backend.to_str())
    card["added_tokens"] = [token for token in card["added_tokens"] if token["content"] in names]
    if split is not None:
        card["pre_tokenizer"] = None
    backend = Tokenizer.from_str(json.dumps(card))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def train_llama_tokenizer(texts, vocab_size):
    """Train a tokenizer like Llama 2's: it puts <s> and a space before each text."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return train_byte_fallback_bpe(
        texts,
        vocab_size,
        split=pre_tokenizers.Split("▁", "merged_with_next"),  # no token of two words
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence(steps),
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


def small_bert(hf_tokenizer, folder, kind, *, seed=0, window=64, **changes):
    """Save random weights of a small BERT with its tokenizer.

    Args:
        kind: its class, such as `BertModel`.
    """
    torch.manual_seed(seed)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vocab_size, pad = len(hf_tokenizer), hf_tokenizer.eos_token_id
    config = BertConfig(vocab_size=vocab_size, **sizes, max_position_embeddings=window, pad_token_id=pad, **changes)
    config.initializer_range = 0.5  # or all texts would look alike
    kind(config).save_pretrained(folder)
    padding = PreTrainedTokenizerFast(
        tokenizer_object=hf_tokenizer.backend_tokenizer,
        pad_token=hf_tokenizer.eos_token,
        model_max_length=window,
    )
    padding.save_pretrained(folder)
    return folder


def save_bert_embedding(hf_tokenizer, folder, *, prompts=None, default_prompt_name=None, window=64):
    """Save a sentence-transformers model of a random BERT with mean pooling; return its folder."""
    parts = [Transformer(str(small_bert(hf_tokenizer, folder / "bert", BertModel, window=window))), Pooling(48)]
    model = SentenceTransformer(modules=parts, device="cpu", prompts=prompts, default_prompt_name=default_prompt_name)
    model.save_pretrained(str(folder / "model"))
    return folder / "model"


def save_cross_encoder(hf_tokenizer, folder, *, num_labels=1):
    """Save a cross-encoder of a random BERT and return its folder."""
    return small_bert(hf_tokenizer, folder, BertForSequenceClassification, window=128, num_labels=num_labels)
