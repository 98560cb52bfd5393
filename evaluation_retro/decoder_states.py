"""Store what a frozen decoder computes, to measure a copy head on it any number of times.

A frozen decoder computes the same states whatever its copy head reads. Here it runs once over each
sequence. Its last hidden states and a few of its logits are kept. They give the likelihoods of the
whole model, exactly:

    stored = store_batch(model, batch)  # a batch of `RetroDataCollator`
    stored.nats(model.copy_head, first)

`training_retro.stored_states` trains a copy head on them.

Shapes: B sequences of T tokens, d hidden size, k neighbors of r tokens, C points with neighbors, V
vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from configuration_retro import RetroConfig
from data_retro.collator import IGNORED_LABEL
from modeling_retro import RetroForCausalLM
from modeling_retro.attention_plan import plan_attention
from modeling_retro.chunk_grid import ChunkGrid
from modeling_retro.copy_head import CopyCandidates, CopyHead, find_candidates
from modeling_retro.matching import match_tokens
from modeling_retro.neighbor_inputs import NeighborInputs
from modeling_retro.retrieval_points import RetrievalPoints

MOST_LOGITS = 2**26  # logits that the decoder computes at a time: 256 MiB in float32
LEAST_REST = 1e-9  # least probability of all tokens that are neither predicted nor copied


@dataclass
class ReadSequences:
    """Sequences that the decoder has read.

    Attributes:
        tokens: (B, T) int64.
        states: (B, T, d) float32, the states that enter the decoder's output embeddings.
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
def read_sequences(
    model: PreTrainedModel, tokens: np.ndarray | torch.Tensor, file: Path | None = None
) -> ReadSequences:
    """Run the decoder over sequences, and return its states and log-sums.

    Args:
        model: a decoder, or RETRO around one. It should be in evaluation mode.
        tokens: (B, T) int64. All tokens are real: there is no padding.
        file: keeps the result. If it exists, it is read and nothing is computed.

    Raises:
        ValueError: the file has the states of other sequences.
    """
    tokens = torch.as_tensor(tokens)
    if file is None or not file.exists():
        states, log_sums = _run(model, tokens)
        if file is None:
            return ReadSequences(tokens, states, log_sums)
        part = file.with_name(f"{file.name}.part")
        with part.open("wb") as whole:
            np.savez(whole, states=states.cpu().numpy(), log_sums=log_sums.cpu().numpy())
        part.replace(file)
    with np.load(file) as stored:
        read = ReadSequences(tokens, *(torch.from_numpy(stored[name]) for name in ("states", "log_sums")))
    if read.log_sums.shape != tokens.shape:
        raise ValueError(
            f"{file} has the states of {tuple(read.log_sums.shape)} tokens, but the sequences have "
            f"{tuple(tokens.shape)}. Give another file, or delete this one."
        )
    return read


def _run(model: PreTrainedModel, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states (B, T, d) and the log-sums (B, T) of sequences, on the model's device."""
    head = _output_embeddings(model)
    states: list[torch.Tensor] = []
    log_sums: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0].float()))
    try:
        for part in tokens.split(max(1, MOST_LOGITS // (tokens.shape[1] * len(head.weight)))):
            logits = _decoder(model)(part.to(model.device)).logits
            log_sums.append(torch.stack([row.float().logsumexp(-1) for row in logits]))
    finally:
        hook.remove()
    return torch.cat(states).to(model.device), torch.cat(log_sums).to(model.device)


def _decoder(model: PreTrainedModel) -> Callable[[torch.Tensor], Any]:
    """Return the forward of a decoder, or of the decoder in RETRO, which takes token ids."""
    settings = {"use_retrieval": False} if isinstance(model, RetroForCausalLM) else {}
    return lambda tokens: model(tokens, use_cache=False, **settings)


def _output_embeddings(model: PreTrainedModel) -> torch.nn.Linear:
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear), "a causal language model's output embeddings are a matrix"
    return head


def few_logits(model: PreTrainedModel, states: torch.Tensor, few: torch.Tensor) -> torch.Tensor:
    """Return the decoder's logits of a few tokens, given its states.

    The decoder finishes them itself, since some decoders scale their logits or cap them.

    Args:
        states: (B, T, d), as in [`ReadSequences`].
        few: (n,) token ids.

    Returns:
        (B, T, n) float32.
    """
    head = _output_embeddings(model)
    weight = head.weight[few.to(head.weight.device)]
    bias = None if head.bias is None else head.bias[few.to(head.weight.device)]

    def put_in_place(*_: object) -> torch.Tensor:
        return F.linear(states.to(weight), weight, bias)

    hook = head.register_forward_hook(put_in_place)
    try:
        return _decoder(model)(few.new_zeros(1, 1)).logits.float().to(states.device)
    finally:
        hook.remove()


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


@torch.no_grad()
def prepare(model: PreTrainedModel, config: RetroConfig, read: ReadSequences, neighbors: NeighborInputs) -> Batch:
    """Match sequences with their neighbors, and compute the few logits that matter.

    Args:
        model: the decoder that read the sequences, or RETRO around it.
        config: the copy head's.
        neighbors: (B, C, k, r) of the first C points of each sequence.
    """
    device, embed = model.device, model.get_input_embeddings()
    tokens, states, log_sums = (tensor.to(device) for tensor in (read.tokens, read.states, read.log_sums))
    neighbors = neighbors.to(device)
    points = RetrievalPoints.of(config, len(read))
    rows, length = tokens.shape
    grid = ChunkGrid.build(points, (rows, length), 0, None, None, device)
    embeds = embed(tokens)
    plan = plan_attention(config, grid, embeds, neighbors, None)
    matches = match_tokens(config, grid, plan, embeds, neighbors, embed(neighbors.ids), None)

    targets, states, log_sums = tokens[:, 1:], states[:, :-1], log_sums[:, :-1]
    few, places = torch.cat([targets.flatten(), neighbors.ids.flatten()]).unique(return_inverse=True)
    logits = few_logits(model, states, few)
    share = (logits.logsumexp(-1) - log_sums).exp()
    rest = log_sums + (1 - share).clamp(min=LEAST_REST).log()
    own_targets, own_ids = places.split([targets.numel(), neighbors.ids.numel()])
    renamed = NeighborInputs(own_ids.view_as(neighbors.ids), neighbors.mask, neighbors.scores)
    candidates = find_candidates(config, plan, matches, renamed)
    assert candidates is not None, "the sequences have neighbors"
    return Batch(torch.cat([logits, rest.unsqueeze(-1)], -1), states, candidates, own_targets.view_as(targets))


def store_batch(model: RetroForCausalLM, batch: Mapping[str, torch.Tensor], read: ReadSequences | None = None) -> Batch:
    """Run the decoder over a batch, and keep what its copy head needs.

    Args:
        model: RETRO with a copy head and without cross-attention.
        batch: as [`data_retro.RetroDataCollator`] makes it, of sequences of one length.
        read: the same sequences, if the decoder has read them before with other neighbors.

    Raises:
        ValueError: the model reads in another way, the batch has no neighbors, or it has padding,
            labels or first points of its own.
    """
    check_reader(model)
    if "neighbor_ids" not in batch:
        raise ValueError("The batch has no neighbor_ids. Give the collator a retriever.")
    labels = batch.get("labels", batch["input_ids"])
    if "attention_mask" in batch or "first_point" in batch or (labels == IGNORED_LABEL).any():
        raise ValueError(
            f"The batch has {', '.join(batch)}. Stored states need sequences of one length that are predicted whole, "
            "without attention_mask, first_point and ignored labels. Pack the text, or train with Trainer."
        )
    names = ("neighbor_ids", "neighbor_attention_mask", "neighbor_scores")
    neighbors = NeighborInputs(*(batch[name] for name in names))
    return prepare(model, model.config, read or read_sequences(model, batch["input_ids"]), neighbors)


def check_reader(model: RetroForCausalLM) -> None:
    """Check that a model reads with a copy head alone.

    Raises:
        ValueError: it has no copy head, or it has cross-attention, which changes the states.
    """
    config = model.config
    if not config.copy_head or config.cca_layers:
        raise ValueError(
            f"The model has copy_head={config.copy_head} and cca_layers={config.cca_layers}. Stored states fit a "
            "copy head alone: set copy_head=True and cca_layers=[], or train with Trainer."
        )
