"""A frozen decoder of any architecture, and a copy head fitted onto its stored states.

The decoder runs once over each corpus. Its last hidden states are kept on disk, so that fitting and
measuring a copy head for one more way to search takes seconds.

Shapes: B sequences of T tokens, d hidden size, k neighbors of r tokens, C chunks with neighbors, V
vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import retrieval.tokenizer_loading
from configuration_retro import RetroConfig
from modeling_retro.attention_plan import plan_attention
from modeling_retro.chunk_grid import ChunkGrid
from modeling_retro.copy_head import CopyCandidates, CopyHead, find_candidates
from modeling_retro.matching import match_tokens
from modeling_retro.neighbor_inputs import NeighborInputs
from modeling_retro.retrieval_points import RetrievalPoints

BATCH = 4  # sequences in a training step
STATES_BATCH = 8  # sequences that the decoder reads at a time
LEARNING_RATE = 2e-3
WARMUP_STEPS = 10
LEAST_REST = 1e-9  # least probability of all tokens that are neither predicted nor copied


def load_decoder(path: Path) -> PreTrainedModel:
    """Load a decoder in float32 from a folder or a GGUF file."""
    folder, file = _place(path)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file).eval()


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load a decoder's tokenizer from a folder or a GGUF file."""
    folder, file = _place(path)
    return retrieval.tokenizer_loading.load_tokenizer(folder, **file)


def _place(path: Path) -> tuple[Path, dict[str, str]]:
    """Return a model's folder, and the argument that names its file if it is a GGUF file."""
    return (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})


@dataclass
class ReadSequences:
    """Sequences that the decoder has read.

    Attributes:
        tokens: (B, T) int64.
        states: (B, T, d) float32, the decoder's last hidden states.
        log_sums: (B, T) float32, the log-sum-exp of the decoder's logits.
    """

    tokens: torch.Tensor
    states: torch.Tensor
    log_sums: torch.Tensor

    def __getitem__(self, rows: slice) -> "ReadSequences":
        return ReadSequences(self.tokens[rows], self.states[rows], self.log_sums[rows])

    def __len__(self) -> int:
        return len(self.tokens)


@torch.no_grad()
def read_sequences(model: PreTrainedModel, tokens: np.ndarray, file: Path) -> ReadSequences:
    """Return what the decoder makes of sequences (B, T), computed once and kept in a file."""
    if not file.exists():
        head = model.get_output_embeddings()
        assert head is not None, "a causal language model has output embeddings"
        states, log_sums = [], []
        for start in range(0, len(tokens), STATES_BATCH):
            batch = torch.from_numpy(tokens[start : start + STATES_BATCH])
            states.append(model.base_model(batch).last_hidden_state)
            log_sums.append(torch.stack([head(row).logsumexp(-1) for row in states[-1]]))
        np.savez(file, states=torch.cat(states).numpy(), log_sums=torch.cat(log_sums).numpy())
    with np.load(file) as stored:
        arrays = (torch.from_numpy(stored[name]) for name in ("states", "log_sums"))
        return ReadSequences(torch.from_numpy(tokens), *arrays)


@dataclass
class Batch:
    """All that the copy head needs of some sequences and their neighbors.

    The logits are exact but few: those of tokens that are predicted or may be copied, and one for
    all others together. Token ids count within these.

    Attributes:
        logits: (B, T − 1, few) of the decoder.
        states: (B, T − 1, d), the decoder's last hidden states.
        candidates: the tokens that may be copied.
        targets: (B, T − 1) int64, the tokens to predict.
    """

    logits: torch.Tensor
    states: torch.Tensor
    candidates: CopyCandidates
    targets: torch.Tensor

    def nats(self, head: CopyHead | None, first: int) -> torch.Tensor:
        """Return the negative log-likelihoods (B, T − 1 − first) of the targets from `first` on.

        Without a head they are the decoder's.
        """
        logits = self.logits
        if head is not None:
            logits = head(logits, self.states, self.candidates, slice(0, self.targets.shape[1]))
        return F.cross_entropy(logits[:, first:].transpose(1, 2), self.targets[:, first:], reduction="none")


def head_config(model: PreTrainedModel, chunk_size: int, k: int) -> RetroConfig:
    """Return the configuration of a copy head on a decoder."""
    embed = model.get_input_embeddings()
    assert isinstance(embed, nn.Embedding), "a causal language model embeds tokens"
    return RetroConfig(
        vocab_size=embed.num_embeddings,
        n_embd=embed.embedding_dim,
        n_head=1,
        n_layer=1,
        chunk_size=chunk_size,
        num_neighbors=k,
        cca_layers=[],
        copy_head=True,
        bos_token_id=None,
        eos_token_id=None,
    )


@torch.no_grad()
def prepare(model: PreTrainedModel, config: RetroConfig, read: ReadSequences, neighbors: NeighborInputs) -> Batch:
    """Match sequences with their neighbors, and compute the few logits that matter.

    Args:
        neighbors: (B, C, k, r) of the first C chunks of each sequence.
    """
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(head, nn.Linear), "a causal language model's output embeddings are a matrix"
    embeds = embed(read.tokens)
    points = RetrievalPoints.of(config, len(read))
    rows, length = read.tokens.shape
    grid = ChunkGrid.build(points, (rows, length), 0, None, None, read.tokens.device)
    plan = plan_attention(config, grid, embeds, neighbors, None)
    matches = match_tokens(config, grid, plan, embeds, neighbors, embed, None)

    targets, states = read.tokens[:, 1:], read.states[:, :-1]
    few, places = torch.cat([targets.flatten(), neighbors.ids.flatten()]).unique(return_inverse=True)
    logits = F.linear(states, head.weight[few], None if head.bias is None else head.bias[few])
    share = (logits.logsumexp(-1) - read.log_sums[:, :-1]).exp()
    rest = read.log_sums[:, :-1] + (1 - share).clamp(min=LEAST_REST).log()
    own_targets, own_ids = places.split([targets.numel(), neighbors.ids.numel()])
    renamed = NeighborInputs(own_ids.view_as(neighbors.ids), neighbors.mask, neighbors.scores)
    candidates = find_candidates(config, plan, matches, renamed)
    assert candidates is not None, "the sequences have neighbors"
    return Batch(torch.cat([logits, rest.unsqueeze(-1)], -1), states, candidates, own_targets.view_as(targets))


def fit_copy_head(config: RetroConfig, batches: Sequence[Batch], steps: int, seed: int = 0) -> CopyHead:
    """Train a copy head on the positions in reach of neighbors; the decoder stays as it is."""
    head = CopyHead(config)
    head.init_weights()
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, (steps - step) / steps)
    )
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        loss = batches[order.pop()].nats(head, config.chunk_size - 1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval()
