"""In-context retrieval (Ram et al., 2023): the decoder reads the neighbors' text before the rest.

The window for the last chunk of a sequence is

    neighbor k, separator, …, neighbor 1, separator, the sequence's earlier chunks, the last chunk

so the best neighbor stands nearest. The neighbors are those of the chunk before the last one, the
same that a RETRO reads there. They go in as tokens, without padding. Nothing is cut off. The
decoder's blocks compute in bfloat16: the windows are long.
"""

import copy
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from evaluation_retro.decoder_states import ReadSequences

DTYPE = torch.bfloat16
WINDOWS_IN_FILE = 8  # windows that are lost at most when a run breaks


def window(sequence: np.ndarray, ids: np.ndarray, mask: np.ndarray, separator: list[int]) -> list[int]:
    """Return the tokens that the decoder reads for one sequence.

    Args:
        sequence: (T,), the context and the last chunk.
        ids, mask: (k, r), the neighbors of the chunk before the last one, the best one first.
        separator: tokens that follow each neighbor.
    """
    tokens: list[int] = []
    for neighbor, is_real in zip(ids[::-1], mask[::-1], strict=True):
        if is_real.any():
            tokens += neighbor[is_real].tolist() + separator
    return tokens + sequence.tolist()


@torch.no_grad()
def read_in_context(
    model: PreTrainedModel,
    plain: ReadSequences,
    ids: np.ndarray,
    mask: np.ndarray,
    separator: list[int],
    chunk_size: int,
    folder: Path,
) -> ReadSequences:
    """Return the sequences, their last chunk predicted from windows with neighbors.

    States and log-sums are in-context retrieval's from the last position before that chunk on, and
    the plain decoder's before. The folder keeps them, so that a broken run can be resumed.

    Args:
        plain: the sequences (N, T), read without neighbors.
        ids, mask: (N, C, k, r), the neighbors of all chunks but the last.
        folder: keeps the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks, head, last = None, model.get_output_embeddings(), chunk_size + 1
    assert head is not None, "a causal language model has output embeddings"
    states, log_sums = plain.states.clone(), plain.log_sums.clone()
    sequences = plain.tokens.numpy()
    for start in range(0, len(plain), WINDOWS_IN_FILE):
        rows = range(start, min(start + WINDOWS_IN_FILE, len(plain)))
        file = folder / f"{start:04d}.npz"
        if not file.exists():
            blocks = blocks or copy.deepcopy(model.base_model).to(DTYPE)
            windows = [window(sequences[row], ids[row, -1], mask[row, -1], separator) for row in rows]
            read = [blocks(torch.tensor([tokens])).last_hidden_state[0, -last:].float() for tokens in windows]
            sums = [head(window_states).logsumexp(-1) for window_states in read]
            unfinished = file.with_suffix(".part.npz")
            np.savez(
                unfinished,
                states=torch.stack(read).numpy(),
                log_sums=torch.stack(sums).numpy(),
                lengths=np.array([len(tokens) for tokens in windows]),
            )
            unfinished.replace(file)
        with np.load(file) as stored:
            states[rows.start : rows.stop, -last:] = torch.from_numpy(stored["states"])
            log_sums[rows.start : rows.stop, -last:] = torch.from_numpy(stored["log_sums"])
    return ReadSequences(plain.tokens, states, log_sums)


def window_lengths(folder: Path) -> np.ndarray:
    """Return the tokens (N,) of each window whose states are in the folder."""
    lengths = []
    for file in sorted(folder.glob("[0-9]*.npz")):
        with np.load(file) as stored:
            lengths.append(stored["lengths"])
    return np.concatenate(lengths)
