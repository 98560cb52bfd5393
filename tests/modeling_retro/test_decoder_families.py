"""RETRO on decoders of every family: the decoder until trained, then as the slow reference."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig

from ..support.by_hand import Grid, HashRetriever, next_token_logits
from ..support.decoders import (
    GROUPED,
    READERS,
    READING,
    SOME,
    TEXT,
    added_parameters,
    decoder_batch,
    open_decoder,
    retro,
    slow_log_probs,
    untrained_retro,
)
from ..support.retro_models import (
    CHUNK,
    VOCAB,
    RowNeighbors,
    neighbor_scores,
    neighbor_tensors,
    random_tokens,
)

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_untrained_it_is_its_decoder_to_the_bit(folder, attention):
    decoder, inputs = open_decoder(folder, attention), decoder_batch()
    expected = decoder(inputs["input_ids"]).logits
    for readers in ({}, READING):
        model = untrained_retro(folder, attention, **readers)
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model(inputs["input_ids"]).logits, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_with_trained_parts_and_no_neighbors_it_is_its_decoder_to_the_bit(folder, attention):
    decoder, model, inputs = open_decoder(folder, attention), retro(folder, attention), decoder_batch()
    expected = decoder(inputs["input_ids"]).logits
    assert torch.equal(model(**inputs, use_retrieval=False).logits, expected)
    assert torch.equal(model(inputs["input_ids"]).logits, expected)
    model.config.use_retrieval = False
    assert torch.equal(model(**inputs).logits, expected)
    read = model(**inputs, use_retrieval=True).logits
    assert torch.equal(read[:, : CHUNK - 1], expected[:, : CHUNK - 1])
    assert (read - expected)[:, CHUNK - 1].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("family", SOME, indirect=True)
@torch.no_grad()
def test_padding_and_generation_without_neighbors_are_the_decoders(folder):
    decoder, model = open_decoder(folder), retro(folder)
    tokens, padding = decoder_batch()["input_ids"], torch.ones(2, TEXT, dtype=torch.long)
    padding[0, :5] = 0
    settings = {"attention_mask": padding, "max_new_tokens": 12, "do_sample": False}
    expected = decoder.generate(tokens, **settings)
    assert torch.equal(model.generate(tokens, **settings), expected)
    assert torch.equal(model.generate(tokens, use_retrieval=False, **settings), expected)
    settings |= {"num_beams": 3}
    assert torch.equal(model.generate(tokens, **settings), decoder.generate(tokens, **settings))


@pytest.mark.parametrize("readers", READERS)
@torch.no_grad()
def test_it_agrees_with_the_slow_reference(family, folder, readers):
    model = retro(folder, "sdpa", **READERS[readers])
    tokens, neighbors, scores = random_tokens(TEXT, 1), RowNeighbors(4, 1, missing={1}).chunks, neighbor_scores(4)
    ids, mask = neighbor_tensors([neighbors], 4)
    given = {"neighbor_ids": ids, "neighbor_attention_mask": mask, "neighbor_scores": scores}
    found = model(torch.tensor([tokens]), **given).logits[0].log_softmax(-1)
    expected = slow_log_probs(family, folder, model, tokens, neighbors, scores[0])
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("family", SOME, indirect=True)
@pytest.mark.parametrize("grid", [Grid(2, 3), Grid(CHUNK + 1, 2)], ids=["early", "late"])
@torch.no_grad()
def test_other_points_agree_with_the_slow_reference(family, folder, grid):
    model, tokens, points = retro(folder), random_tokens(TEXT, 2), grid.points(random_tokens(TEXT, 2))
    found = HashRetriever().retrieve(grid.queries(tokens))
    pairs = [zip(*row, strict=True) for row in zip(found.ids, found.attention_mask, strict=True)]
    neighbors = {u: [ids[mask].tolist() for ids, mask in row] for u, row in enumerate(pairs)}
    expected = slow_log_probs(family, folder, model, tokens, neighbors, found.scores, points)
    model.set_retriever(HashRetriever())
    logits = model(torch.tensor([tokens]), **grid.arguments()).logits[0]
    torch.testing.assert_close(logits.log_softmax(-1), expected, **TOLERANCE)
    torch.testing.assert_close(logits[-1], next_token_logits(model, tokens, grid), **TOLERANCE)


@pytest.mark.parametrize("family", SOME, indirect=True)
@torch.no_grad()
def test_the_encoder_reads_the_query_in_other_layers_or_not_at_all(family, folder):
    for encoder_cca_layers in ([], [0, 1]):
        model = retro(folder, encoder_cca_layers=encoder_cca_layers)
        tokens, neighbors, scores = random_tokens(2 * CHUNK, 1), RowNeighbors(2, 1).chunks, neighbor_scores(2)
        ids, mask = neighbor_tensors([neighbors], 2)
        found = model(torch.tensor([tokens]), neighbor_ids=ids, neighbor_attention_mask=mask, neighbor_scores=scores)
        expected = slow_log_probs(family, folder, model, tokens, neighbors, scores[0])
        torch.testing.assert_close(found.logits[0].log_softmax(-1), expected, **TOLERANCE)


def test_no_token_sees_later_ones_or_their_neighbors(folder):
    model, inputs = retro(folder), decoder_batch(rows=1)
    tokens = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(tokens).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, **inputs).logits[0]
    for i in range(0, TEXT - 1, 3):
        (gradient,) = torch.autograd.grad(logits[i].sum(), embeds, retain_graph=True)
        assert not gradient[0, i + 1 :].any()
        assert gradient[0, i].abs().max() > 0
    with torch.no_grad():
        for chunk in (0, 2, 3):
            changed = inputs["neighbor_ids"].clone()
            changed[:, chunk] = (changed[:, chunk] + 1) % VOCAB
            after = model(inputs_embeds=embeds, **{**inputs, "neighbor_ids": changed}).logits[0]
            differs = (after - logits).abs().amax(-1) > 1e-7
            first = (chunk + 1) * CHUNK - 1
            assert not differs[:first].any() and differs[first : first + CHUNK].all()


@torch.no_grad()
def test_cross_attentions_and_states_are_returned(folder):
    model, inputs = retro(folder, cca_match=False), decoder_batch()
    output = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert torch.equal(output.logits, model(**inputs).logits)
    assert len(output.attentions) == 3 and len(output.hidden_states) == 4
    assert len(output.cross_attentions) == len(model.config.cca_layers)
    reads = torch.tensor([[i >= CHUNK - 1 and (i + 1) // CHUNK != 2 for i in range(TEXT)]])
    for weights in output.cross_attentions:
        assert weights.shape[0] == 2 and weights.shape[2:] == (TEXT, inputs["neighbor_ids"][0, 0].numel())
        torch.testing.assert_close(weights.sum(-1), reads.float()[:, None].expand_as(weights.sum(-1)))


def test_retrofitting_keeps_the_decoder(folder):
    decoder, inputs = open_decoder(folder), decoder_batch()
    model = retro(folder)
    model.freeze_backbone()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(added_parameters(model))
    before = copy.deepcopy({name: p.detach() for name, p in added_parameters(model).items()})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    model.train()
    for _ in range(3):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert all(not torch.equal(p, before[name]) for name, p in added_parameters(model).items())
    nested = model.transformer.decoder.state_dict()
    for name, weight in decoder.state_dict().items():
        assert torch.equal(nested[name], weight)
    with torch.no_grad():
        expected = decoder(inputs["input_ids"]).logits
        assert torch.equal(model(**inputs, use_retrieval=False).logits, expected)
        assert not torch.allclose(model(**inputs).logits[:, CHUNK:], expected[:, CHUNK:], atol=1e-3)


@torch.no_grad()
def test_a_mixture_of_experts_computes_as_its_decoder_does(tmp_path):
    torch.manual_seed(0)
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8, "head_dim": 8}
    AutoModelForCausalLM.from_config(GptOssConfig(**GROUPED, **experts)).save_pretrained(tmp_path)
    decoder, model, inputs = open_decoder(tmp_path), retro(tmp_path), decoder_batch()
    assert model.transformer.decoder.config._experts_implementation == decoder.config._experts_implementation
    assert torch.equal(model(**inputs, use_retrieval=False).logits, decoder(inputs["input_ids"]).logits)
