"""A small RETRO whose weights are all away from their start, and neighbors of many lengths."""

import torch

from modeling_retro import RetroConfig, RetroForCausalLM
from modeling_retro.chunked_cross_attention import ChunkedCrossAttention

CHUNK, NEIGHBORS, LENGTH, VOCAB = 4, 2, 6, 61
LONG = 8  # tokens of a chunk that is long enough to tell passages apart


def small_config(**changes) -> RetroConfig:
    settings = {
        "vocab_size": VOCAB,
        "n_positions": 64,
        "n_embd": 16,
        "n_layer": 4,
        "n_head": 2,
        "chunk_size": CHUNK,
        "num_neighbors": NEIGHBORS,
        "neighbor_length": LENGTH,
        "cca_layers": [1, 3],
        "copy_head": True,
        "cca_match": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "initializer_range": 0.3,  # large, so that every path matters to the logits
        "attn_implementation": "eager",
    }
    return RetroConfig(**(settings | changes))


def small_model(**changes) -> RetroForCausalLM:
    torch.manual_seed(0)
    model = RetroForCausalLM(small_config(**changes)).eval()
    open_weights(model, model.parameters(), noise=0.2)
    return model


@torch.no_grad()
def open_weights(model, parameters, noise: float) -> None:
    """Move parameters away from their start, where zeros and unit norms would hide mistakes."""
    for parameter in parameters:
        parameter.add_(torch.randn_like(parameter) * noise)
    for module in model.modules():
        if isinstance(module, ChunkedCrossAttention) and model.config.cca_match:
            module.match.mul_(0.1)  # it is multiplied by 30
    if model.config.copy_head:
        for parameter in (model.copy_head.gate_bias, model.copy_head.gate_features, model.copy_head.similarity):
            parameter.mul_(0.1)  # they are multiplied by 30
        model.copy_head.gate_scale.fill_(0.5)


class RowNeighbors:
    """Random neighbors for one row: chunk -> neighbors of 1 to LENGTH ids. Some are missing."""

    def __init__(self, num_chunks: int, seed: int, missing: set = frozenset()):
        rng = torch.Generator().manual_seed(seed)
        self.chunks = {}
        for chunk in range(num_chunks):
            lengths = torch.randint(1, LENGTH + 1, (NEIGHBORS,), generator=rng).tolist()
            neighbors = [torch.randint(0, VOCAB, (length,), generator=rng).tolist() for length in lengths]
            if chunk in missing:
                neighbors = []
            elif chunk % 3 == 2:
                neighbors = neighbors[:1]
            self.chunks[chunk] = neighbors


def neighbor_scores(num_slots: int, seed: int = 0) -> torch.Tensor:
    """Return similarities of one row's neighbors, (1, C, k)."""
    return torch.rand(1, num_slots, NEIGHBORS, generator=torch.Generator().manual_seed(seed))


def neighbor_tensors(rows: list[dict], num_slots: int, first: list[int] | None = None):
    """Return ids and mask (B, C, k, r) of rows of chunk -> neighbors; slot 0 is first[row]."""
    ids = torch.full(
        (len(rows), num_slots, NEIGHBORS, LENGTH), 7
    )  # padding is an ordinary token, told only by the mask
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, chunks in enumerate(rows):
        for slot in range(num_slots):
            for place, neighbor in enumerate(chunks.get(slot + (first[row] if first else 0), [])):
                ids[row, slot, place, : len(neighbor)] = torch.tensor(neighbor)
                mask[row, slot, place, : len(neighbor)] = True
    return ids, mask


def random_tokens(length: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB - 1, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def rows_that_repeat_their_neighbors(seed, rows=8, chunks=4):
    """Return random tokens, and neighbors that repeat each chunk's end and its continuation."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (rows, (chunks + 1) * LONG), generator=rng)
    ids = torch.randint(0, VOCAB, (rows, chunks, NEIGHBORS, 2 * LONG), generator=rng)
    for chunk in range(chunks):
        end = (chunk + 1) * LONG
        ids[:, chunk, 1, 1 : 5 + LONG] = tokens[:, end - 4 : end + LONG]
    return {
        "input_ids": tokens,
        "labels": tokens,
        "neighbor_ids": ids,
        "neighbor_attention_mask": torch.ones_like(ids, dtype=torch.bool),
    }


def fit_readers(model, batch_of_step) -> None:
    """Train sixty steps of RETROfitting, and leave the model in evaluation mode."""
    model.train().freeze_backbone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(60):
        model(**batch_of_step(step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
