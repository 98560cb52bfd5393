"""Make the keys of kNN-LM: the decoder's last hidden states over the knowledge base's texts.

Texts are read in windows. Each window begins with tokens of the one before it, so that every key
has some context. Keys are numbered in the order of the texts, so that a broken run can go on.

Shapes: B rows, d hidden size.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from retrieval import KnowledgeBaseError, MilvusStore
from retrieval.rows import doc_key

from .in_context import Progress
from .key_store import ROWS_PER_CALL, KeyStore
from .opening import fingerprint

WINDOWS = 4  # that the decoder reads at a time
DOCUMENTS_PER_CALL = 500

Text = tuple[str, Sequence[int]]  # a document's id and its tokens


@dataclass
class KeySettings:
    """Where the keys of kNN-LM are, and how they are made."""

    key_store: str = field(
        default="knn_keys.db",
        metadata={"help": "Keys of kNN-LM: a Milvus Lite file, or a server's URI (its token: MILVUS_TOKEN)."},
    )
    key_collection: str = field(default="knn_keys", metadata={"help": "Collection of the keys of kNN-LM."})
    key_index: str = field(
        default="FLAT", metadata={"help": "Index of the keys, such as FLAT (exact) or HNSW:M=32,ef=128."}
    )
    max_keys: int = field(
        default=200_000, metadata={"help": "Most keys of kNN-LM. Documents are drawn until there are so many."}
    )
    key_window: int = field(default=512, metadata={"help": "Tokens that the decoder reads at a time to make keys."})
    key_context: int = field(
        default=128, metadata={"help": "Tokens before each key that the decoder reads at least, if the text has them."}
    )

    def __post_init__(self) -> None:
        if self.max_keys < 1:
            raise ValueError(f"max_keys is {self.max_keys}. Give 1 or more.")
        if not 0 <= self.key_context < self.key_window:
            raise ValueError(
                f"key_context is {self.key_context} and key_window {self.key_window}. Give a context from 0 to below "
                "the window."
            )


def knowledge_texts(knowledge_base: MilvusStore, max_keys: int, seed: int = 0) -> list[Text]:
    """Draw documents of a knowledge base until their tokens make enough keys.

    Args:
        max_keys: keys that are wanted. All documents are taken if they have fewer.
        seed: of the draw.
    """
    chunks = Counter(row["doc_id"] for row in knowledge_base.scan(("doc_id",)))
    doc_ids = sorted(chunks)
    random.Random(seed).shuffle(doc_ids)
    texts: list[Text] = []
    keys = 0
    for start in range(0, len(doc_ids), DOCUMENTS_PER_CALL):
        part = doc_ids[start : start + DOCUMENTS_PER_CALL]
        pieces: dict[str, dict[int, Sequence[int]]] = {doc_id: {} for doc_id in part}
        wanted = sorted(map(doc_key, part))
        for row in knowledge_base.scan(("doc_id", "chunk_index", "tokens"), f"doc_key in {wanted}"):
            pieces[row["doc_id"]][row["chunk_index"]] = row["tokens"]
        for doc_id in part:
            if keys >= max_keys:
                return texts
            tokens = [token for _, piece in sorted(pieces[doc_id].items()) for token in piece]
            texts.append((doc_id, tokens))
            keys += len(tokens) - 1
    return texts


@dataclass(frozen=True)
class KeyWindow:
    """Tokens that the decoder reads at a time to make keys.

    Attributes:
        doc_id: the document.
        tokens: what is read.
        first: the first column that becomes a key. The columns before it are context.
        values: the tokens that follow the keys.
        number: the first key's number.
    """

    doc_id: str
    tokens: Sequence[int]
    first: int
    values: Sequence[int]
    number: int


def key_windows(texts: Iterable[Text], settings: KeySettings) -> list[KeyWindow]:
    """Cut texts into windows, so that every token with a next one becomes a key once."""
    windows: list[KeyWindow] = []
    number = 0
    for doc_id, tokens in texts:
        done = 0
        while done < len(tokens) - 1 and number < settings.max_keys:
            start = max(0, done - settings.key_context)
            end = min(start + settings.key_window, len(tokens) - 1, done + settings.max_keys - number)
            windows.append(KeyWindow(doc_id, tokens[start:end], done - start, tokens[done + 1 : end + 1], number))
            number += end - done
            done = end
    return windows


def key_bar(numbers: Sequence[int]) -> Iterable[int]:
    """Show a bar over the batches of windows that are read."""
    return tqdm(numbers, desc="Making keys", unit="batch")


def build_keys(
    decoder: PreTrainedModel,
    texts: Sequence[Text],
    settings: KeySettings,
    progress: Progress = key_bar,
) -> KeyStore:
    """Make the keys of texts, or open them if they are there. A broken run is continued.

    Args:
        decoder: a causal language model of transformers, in evaluation mode.
        texts: documents as tokens, such as [`knowledge_texts`] returns.
        settings: where they are, and how they are made.
        progress: goes through the numbers of batches.

    Raises:
        KnowledgeBaseError: the store has keys of another decoder, of other texts or windows; or
            keys were lost in it.
        ValueError: the texts make no keys, or the window is longer than the decoder's positions.
    """
    most = getattr(decoder.config, "max_position_embeddings", None) or settings.key_window
    if settings.key_window > most:
        raise ValueError(
            f"key_window is {settings.key_window}, but the decoder has {most} positions. Set a smaller one."
        )
    windows = key_windows(texts, settings)
    if not windows:
        raise ValueError(f"The {len(texts)} texts make no keys. Give texts of at least two tokens.")
    total = windows[-1].number + len(windows[-1].values)
    identity = {
        "decoder": f"{type(decoder).__name__}, {decoder.dtype}, {fingerprint(decoder)}",
        "texts": texts_fingerprint(texts),
        "window": [settings.key_window, settings.key_context],
        "number of keys": total,
    }
    head = decoder.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear), "a causal language model's output embeddings are a matrix"
    store = KeyStore(settings.key_store, settings.key_collection)
    try:
        store.open(identity, head.in_features, settings.key_index)
        count = store.count()
        if count < total:
            # the last call may have written a part of its rows
            missing = [w for w in windows if w.number + len(w.values) > count - ROWS_PER_CALL]
            for start in progress(range(0, len(missing), WINDOWS)):
                _write_keys(decoder, store, missing[start : start + WINDOWS])
            store.flush()
            if (count := store.count()) != total:
                raise KnowledgeBaseError(f"{store.where} has {count} keys of {total}. Delete it, and build it again.")
    except BaseException:
        store.close()
        raise
    return store


@torch.no_grad()
def _write_keys(decoder: PreTrainedModel, store: KeyStore, windows: Sequence[KeyWindow]) -> None:
    # a causal decoder does not see padding on the right
    rows = [torch.tensor(window.tokens, device=decoder.device) for window in windows]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with output_states(decoder, keep=slice(1)) as states:
        decoder(input_ids=padded, use_cache=False)
    keys = [states[0][row, w.first : w.first + len(w.values)] for row, w in enumerate(windows)]
    tokens = [token for window in windows for token in window.values]
    doc_ids = [window.doc_id for window in windows for _ in window.values]
    store.write(windows[0].number, torch.cat(keys).float().cpu().numpy(), tokens, doc_ids)


@contextmanager
def output_states(decoder: PreTrainedModel, keep: slice = slice(None)) -> Iterator[list[torch.Tensor]]:
    """Collect the states that enter the decoder's output embeddings in this block.

    Args:
        keep: the columns whose logits are computed. States are collected of all.

    Yields:
        a list that grows by the states (B, columns, d) of each forward.
    """
    states: list[torch.Tensor] = []

    def collect(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        states.append(inputs[0])
        return (inputs[0][:, keep], *inputs[1:])

    head = decoder.get_output_embeddings()
    assert head is not None, "a causal language model has output embeddings"
    hook = head.register_forward_pre_hook(collect)
    try:
        yield states
    finally:
        hook.remove()


def texts_fingerprint(texts: Iterable[Text]) -> str:
    """Return a hash of the documents' ids and tokens, in their order."""
    digest = hashlib.sha256()
    for doc_id, tokens in texts:
        digest.update(f"{len(doc_id)} {doc_id} {len(tokens)} ".encode() + np.asarray(tokens, dtype=np.int64).tobytes())
    return digest.hexdigest()
