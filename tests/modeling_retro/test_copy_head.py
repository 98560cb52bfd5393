"""The copy head learns to open and when to stay closed, and computes a mixture of distributions."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_retro import RetroForCausalLM

from ..support.retro_models import (
    CHUNK,
    LONG,
    NEIGHBORS,
    VOCAB,
    RowNeighbors,
    fit_readers,
    neighbor_tensors,
    random_tokens,
    rows_that_repeat_their_neighbors,
    small_model,
)


@pytest.mark.parametrize("cca_layers", [[], [1]])
def test_it_learns_to_copy_within_a_few_steps_and_bad_neighbors_do_no_harm(tmp_path, cca_layers):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=VOCAB, n_positions=64)).save_pretrained(
        tmp_path
    )
    sizes = {"chunk_size": LONG, "num_neighbors": NEIGHBORS, "cca_layers": cca_layers}
    model = RetroForCausalLM.from_pretrained(tmp_path, copy_head=True, **sizes)

    def batch_of_step(step):
        batch = rows_that_repeat_their_neighbors(step)
        batch["neighbor_ids"][::2] = batch["neighbor_ids"][::2].roll(1, 0)  # half of the rows get another row's
        return batch

    fit_readers(model, batch_of_step)
    batch = rows_that_repeat_their_neighbors(1000)
    with torch.no_grad():
        on, off = model(**batch).loss, model(**batch, use_retrieval=False).loss
        shuffled = model(**batch | {"neighbor_ids": batch["neighbor_ids"].roll(1, 0)}).loss
    assert on < off - 2  # of ln 61 = 4.1 nats, at four fifths of the positions
    assert shuffled < 1.01 * off


def test_an_unlikely_token_can_be_copied_and_nothing_overflows():
    """The mixture is a distribution even where the decoder gives a token e^-300."""
    model = small_model()
    tokens, neighbors = random_tokens(2 * CHUNK, seed=1), RowNeighbors(2, seed=1).chunks
    ids, mask = neighbor_tensors([neighbors], 2)
    outputs = model.transformer(torch.tensor([tokens]), neighbor_ids=ids, neighbor_attention_mask=mask)
    hidden = outputs.last_hidden_state
    decoder = torch.full((1, 2 * CHUNK, VOCAB), -300.0)
    decoder[..., 0] = 0.0
    with torch.no_grad():
        for parameter in (model.copy_head.gate_hidden, model.copy_head.gate_features, model.copy_head.gate_bias):
            parameter.zero_()
        model.copy_head.gate_scale.fill_(1.0)  # a gate of one half
        copy_probs, _, token_ids = model.copy_head.copy_distribution(outputs.copy_candidates)
    decoder.requires_grad_()
    mixed = model.copy_head(decoder, hidden, outputs.copy_candidates, slice(None)).softmax(-1)
    copied = torch.zeros_like(mixed).scatter_add(-1, token_ids, copy_probs)
    reads = torch.arange(2 * CHUNK) >= CHUNK - 1
    expected = 0.5 * decoder.softmax(-1) + 0.5 * copied
    torch.testing.assert_close(mixed[:, reads], expected[:, reads], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[:, ~reads], decoder.softmax(-1)[:, ~reads])
    mixed.square().sum().backward()
    assert decoder.grad.isfinite().all()


def test_a_gate_that_training_has_closed_can_open_again():
    model = small_model()
    tokens, neighbors = random_tokens(3 * CHUNK, seed=1), RowNeighbors(3, seed=1).chunks
    ids, mask = neighbor_tensors([neighbors], 3)
    with torch.no_grad():
        model.copy_head.gate_scale.fill_(-0.1)
    inputs = {"neighbor_ids": ids, "neighbor_attention_mask": mask}
    closed = model(torch.tensor([tokens]), **inputs)
    plain = small_model(copy_head=False)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(closed.logits, plain(torch.tensor([tokens]), **inputs).logits)
    closed.logits.log_softmax(-1)[0, CHUNK, neighbors[0][0][0]].backward()
    assert model.copy_head.gate_scale.grad.abs() > 0


def test_a_checkpoint_without_a_copy_head_loads_as_before_and_can_be_given_one(tmp_path):
    old = small_model(copy_head=False)
    old.save_pretrained(tmp_path)
    ids, mask = neighbor_tensors([RowNeighbors(3, seed=5).chunks], 3)
    inputs = {"input_ids": torch.tensor([random_tokens(3 * CHUNK, seed=2)])}
    inputs |= {"neighbor_ids": ids, "neighbor_attention_mask": mask}
    same = RetroForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    given = RetroForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", copy_head=True)
    assert not hasattr(same, "copy_head") and hasattr(given, "copy_head")
    for model in (same, given):
        assert torch.equal(model(**inputs).logits, old(**inputs).logits)
    given.freeze_backbone()
    assert all(parameter.requires_grad for parameter in given.copy_head.parameters())


def test_scores_of_another_shape_are_refused():
    ids, mask = neighbor_tensors([{}], 2)
    with pytest.raises(ValueError, match="neighbor_scores has shape"):
        small_model()(
            torch.tensor([random_tokens(2 * CHUNK, seed=1)]), neighbor_ids=ids, neighbor_scores=torch.zeros(1, 2, 3)
        )


@torch.no_grad()
def test_gate_and_attention_give_the_mixture_that_is_predicted():
    model = small_model()
    tokens, neighbors = random_tokens(3 * CHUNK, seed=1), RowNeighbors(3, seed=1, missing={1}).chunks
    ids, mask = neighbor_tensors([neighbors], 3)
    inputs = {"neighbor_ids": ids, "neighbor_attention_mask": mask}
    outputs = model.transformer(torch.tensor([tokens]), **inputs)
    hidden = outputs.last_hidden_state
    decoder = model.lm_head(hidden)
    gate, places = model.copy_head.gate_and_attention(decoder, hidden, outputs.copy_candidates)
    mixed = model(torch.tensor([tokens]), **inputs).logits.softmax(-1)[0]
    for i in range(len(tokens)):
        chunk = (i + 1) // CHUNK - 1
        expected = (1 - gate[0, i]) * decoder[0, i].softmax(-1)
        if chunk >= 0 and chunk != 1:
            expected = expected.scatter_add(0, ids[0, chunk].flatten(), gate[0, i] * places[0, i])
        else:
            assert gate[0, i] == 0
        torch.testing.assert_close(mixed[i], expected, atol=1e-5, rtol=1e-4)


def test_a_missing_neighbor_may_have_any_score():
    """A retriever gives nan then, which must not reach the logits or a gradient."""
    model = small_model()
    tokens, neighbors = random_tokens(3 * CHUNK, seed=1), RowNeighbors(3, seed=1).chunks
    ids, mask = neighbor_tensors([neighbors], 3)
    mask[0, 0] = False  # all neighbors of one chunk, one of another
    mask[0, 1, 1] = False
    scores = torch.rand(mask.shape[:3]).masked_fill(~mask.any(-1), torch.nan)
    given = {"input_ids": torch.tensor([tokens]), "neighbor_ids": ids, "neighbor_attention_mask": mask}
    expected = model(**given, neighbor_scores=scores.nan_to_num(0.3)).logits
    with_nan = model(**given, labels=torch.tensor([tokens]), neighbor_scores=scores)
    torch.testing.assert_close(with_nan.logits, expected)
    with_nan.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
