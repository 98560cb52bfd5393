"""Train small decoders of several architectures, for a minute each, on text of the machine."""

import random
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from retrieval import BulkTokenizer, Document

LENGTH = 256  # tokens of a training sequence, and the decoders' positions
BATCH = 8
LEARNING_RATE = 2e-3
WARMUP_STEPS = 20
TRAINED_PART = 3  # one document of three is for training decoders, the others for measuring
MEASURED = 600  # documents of a corpus to measure on, at most
BEGINNING = 20_000  # characters that are kept of each
CHARACTERS, LONGEST = 1_000_000, 50_000  # of a corpus and of a document, to train a decoder on

WIDTH, LAYERS, HEADS = 192, 4, 4
TOKENS = {"bos_token_id": 0, "eos_token_id": 0}
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
}
GPT2_SIZES = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": LENGTH}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
CONFIGURATIONS: dict[str, Callable[[int], PreTrainedConfig]] = {
    "gpt2": lambda vocabulary: GPT2Config.from_dict({"vocab_size": vocabulary, **GPT2_SIZES, **NO_DROPOUT, **TOKENS}),
    "llama": lambda vocabulary: LlamaConfig.from_dict({"vocab_size": vocabulary, **SIZES, **TOKENS}),
    "neox": lambda vocabulary: GPTNeoXConfig.from_dict({"vocab_size": vocabulary, **SIZES, **TOKENS}),
}
VOCABULARIES = {"gpt2": 4096, "llama": 6144, "neox": 2048}


def is_for_training(document: Document) -> bool:
    """Return True for a document that decoders may be trained on, and nothing is measured on."""
    return zlib.crc32(document.id.encode()) % TRAINED_PART == 0


def measured_documents(documents: Callable[[], Iterable[Document]]) -> list[Document]:
    """Return the beginnings of up to `MEASURED` documents that no decoder is trained on."""
    kept = [document for document in documents() if not is_for_training(document)]
    drawn = random.Random(0).sample(kept, min(MEASURED, len(kept)))
    return [Document(document.id, document.text[:BEGINNING]) for document in drawn]


def training_texts(documents: Iterable[Document]) -> list[str]:
    """Return a corpus' texts to train decoders on, up to `CHARACTERS` in all."""
    texts = [document.text for document in documents if is_for_training(document)]
    random.Random(0).shuffle(texts)
    kept: list[str] = []
    for text in texts:
        if sum(map(len, kept)) < CHARACTERS:
            kept.append(text[:LONGEST])
    return kept


def train_decoder(name: str, texts: list[str], steps: int, folder: Path) -> Path:
    """Train a decoder and its tokenizer into a folder, unless that was done before.

    Args:
        name: of `CONFIGURATIONS`; it is also the seed.
        texts: those of all corpora.
    """
    if (folder / "config.json").exists():
        return folder
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, VOCABULARIES[name], special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    encoded = BulkTokenizer(tokenizer).encode_batch(texts)
    tokens = torch.tensor([token for ids in encoded for token in [*ids, 0]])
    torch.manual_seed(zlib.crc32(name.encode()))
    model = AutoModelForCausalLM.from_config(CONFIGURATIONS[name](VOCABULARIES[name]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, (steps - step) / steps)
    )
    for step in range(steps):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,)).tolist()
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts])
        logits = model(batch).logits[:, :-1]
        loss = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"{name}, step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    return folder
