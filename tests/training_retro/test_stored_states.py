"""Stored states say what the whole model says, and a copy head fitted on them is the model's."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from evaluation_retro.decoder_states import prepare, read_sequences, store_batch
from modeling_retro import RetroConfig
from modeling_retro.attention_plan import plan_attention
from modeling_retro.chunk_grid import ChunkGrid
from modeling_retro.copy_head import CopyHead, find_candidates
from modeling_retro.matching import match_tokens
from modeling_retro.neighbor_inputs import NeighborInputs
from modeling_retro.retrieval_points import RetrievalPoints
from training_retro.stored_states import fit_copy_head, fit_reader

from ..support.retro_models import LONG, rows_that_repeat_their_neighbors, small_model

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODERS = {
    "llama": {},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "final_logit_softcapping": 2.0},  # caps its logits
    "granite": {"logits_scaling": 3.0},  # divides them
    "phi": {"pad_token_id": None},  # has a bias on them
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 24},  # its states are narrower than its layers
}


def a_batch(seed=0):
    batch = rows_that_repeat_their_neighbors(seed)
    return batch | {"neighbor_scores": torch.rand(batch["neighbor_ids"].shape[:3])}


def a_reader(**changes):
    """Return a small RETRO whose only reader is an open copy head."""
    sizes = {"chunk_size": LONG, "neighbor_length": 2 * LONG}
    return small_model(**({"cca_layers": [], "cca_match": False} | sizes | changes))


def nats_of_the_model(model, batch):
    tokens = batch["input_ids"]
    return F.cross_entropy(model(**batch).logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_few_logits_give_the_likelihoods_of_the_whole_vocabulary(kind, missing, tmp_path):
    torch.manual_seed(1)
    settings = {"vocab_size": 300, "bos_token_id": None, "eos_token_id": None} | SIZES | DECODERS[kind]
    decoder = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    for parameter in decoder.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    tokens, ids = torch.randint(300, (2, 32)), torch.randint(300, (2, 3, 2, 16))
    mask = torch.ones(2, 3, 2, 16, dtype=torch.bool)
    mask[0, 1, 1] = not missing
    ids[:, :, 0] = tokens[:, 4:20].unsqueeze(1)  # something to copy
    neighbors = NeighborInputs(ids, mask, torch.rand(2, 3, 2))
    embed, states = decoder.get_input_embeddings(), []
    decoder.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    logits = decoder(tokens).logits
    width = states[0].shape[-1]
    reader = {"chunk_size": 8, "num_neighbors": 2, "cca_layers": [], "copy_head": True}
    config = RetroConfig(vocab_size=300, n_embd=width, n_head=1, **reader)
    head = CopyHead(config)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.ones_(head.gate_scale)

    read = read_sequences(decoder, tokens.numpy(), tmp_path / "states.npz")
    batch = prepare(decoder, config, read, neighbors)

    grid = ChunkGrid.build(RetrievalPoints.of(config, 2), tokens.shape, 0, None, None, tokens.device)
    plan = plan_attention(config, grid, states[0], neighbors, None)
    matches = match_tokens(config, grid, plan, embed(tokens), neighbors, embed(neighbors.ids), None)
    whole = head(logits, states[0], find_candidates(config, plan, matches, neighbors), slice(None))[:, :-1]
    expected = F.cross_entropy(whole.transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(batch.nats(head, 0), expected, atol=1e-4, rtol=1e-4)
    alone = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(batch.nats(None, 0), alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, alone, atol=1e-2)
    again = read_sequences(None, tokens, tmp_path / "states.npz")  # kept: nothing runs
    assert torch.equal(again.states, read.states) and torch.equal(again.log_sums, read.log_sums)


@torch.no_grad()
def test_a_stored_batch_has_the_likelihoods_of_the_model():
    model, batch = a_reader(), a_batch()
    stored = store_batch(model, batch)
    torch.testing.assert_close(stored.nats(model.copy_head, 0), nats_of_the_model(model, batch), atol=1e-4, rtol=1e-4)
    off = nats_of_the_model(model, batch | {"use_retrieval": False})
    torch.testing.assert_close(stored.nats(None, 0), off, atol=1e-4, rtol=1e-4)


def test_the_model_gets_the_fitted_copy_head_and_reads_better_with_it():
    model, other = a_reader(), a_batch(seed=1)
    decoder = {name: parameter.clone() for name, parameter in model.named_parameters() if "copy_head" not in name}
    stored = [store_batch(model, a_batch(seed)) for seed in range(2, 5)]
    fit_reader(model, stored, steps=60)
    with torch.no_grad():
        on = float(nats_of_the_model(model, other)[:, LONG:].mean())
        off = float(nats_of_the_model(model, other | {"use_retrieval": False})[:, LONG:].mean())
        by_stored = float(store_batch(model, other).nats(model.copy_head, LONG).mean())
    assert on < 0.7 * off and by_stored == pytest.approx(on, abs=1e-4)
    assert all(torch.equal(dict(model.named_parameters())[name], parameter) for name, parameter in decoder.items())


def test_the_seed_decides_the_copy_head():
    model = a_reader()
    stored = [store_batch(model, a_batch(seed)) for seed in range(3)]
    steps = []

    def progress(numbers):
        for number in numbers:
            steps.append(number)
            yield number

    first, second, third = (fit_copy_head(model.config, stored, 5, seed, progress).state_dict() for seed in (1, 1, 2))
    assert steps == 3 * list(range(5))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)


@pytest.mark.parametrize("changes", [{}, {"copy_head": False}])
def test_other_readers_are_refused(changes):
    model = a_reader(cca_layers=[1], **changes)
    with pytest.raises(ValueError, match="cca_layers"):
        store_batch(model, a_batch())
    with pytest.raises(ValueError, match="cca_layers"):
        fit_reader(model, [], 5)


def test_batches_that_cannot_be_stored_are_refused():
    model, batch = a_reader(), a_batch()
    without = {name: tensor for name, tensor in batch.items() if not name.startswith("neighbor")}
    with pytest.raises(ValueError, match="retriever"):
        store_batch(model, without)
    for more in (
        {"attention_mask": torch.ones_like(batch["input_ids"])},
        {"first_point": torch.tensor([LONG] * len(batch["input_ids"]))},
        {"labels": torch.where(batch["labels"] == batch["labels"][0, -1], -100, batch["labels"])},
    ):
        with pytest.raises(ValueError, match="one length"):
            store_batch(model, batch | more)
    with pytest.raises(ValueError, match="no batches"):
        fit_reader(model, [], 5)


def test_kept_states_are_whole_and_of_the_same_sequences(tmp_path):
    model, tokens = a_reader(), a_batch()["input_ids"]
    for name in ("states", "states.npz"):
        read = read_sequences(model, tokens, tmp_path / name)
        assert torch.equal(read_sequences(None, tokens, tmp_path / name).states, read.states)
    assert {file.name for file in tmp_path.iterdir()} == {"states", "states.npz"}
    with pytest.raises(ValueError, match="but the sequences have .*Give another file, or delete this one"):
        read_sequences(model, tokens[:, :-1], tmp_path / "states")


def test_labels_may_be_left_out_and_no_steps_are_refused():
    model, batch = a_reader(), a_batch()
    batch.pop("labels", None)
    stored = store_batch(model, batch)
    torch.testing.assert_close(stored.nats(model.copy_head, 0), nats_of_the_model(model, batch), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="steps is 0. Give at least 1"):
        fit_copy_head(model.config, [stored], 0)
