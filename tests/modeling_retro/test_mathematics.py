"""The model is GPT-2 until trained, agrees with a slow reference, and is causal and masked."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_retro import RetroConfig, RetroForCausalLM

from ..support import reference
from ..support.retro_models import (
    CHUNK,
    LENGTH,
    NEIGHBORS,
    VOCAB,
    RowNeighbors,
    neighbor_scores,
    neighbor_tensors,
    random_tokens,
    small_model,
)

ATOL = 1e-5


def run(model, tokens, neighbors, **kwargs):
    """Return the logits (T, V) of one row."""
    ids, mask = neighbor_tensors([neighbors], len(tokens) // CHUNK)
    return model(torch.tensor([tokens]), neighbor_ids=ids, neighbor_attention_mask=mask, **kwargs).logits[0]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("with_neighbors", [False, True])
@pytest.mark.parametrize(
    "readers", [{}, {"cca_match": True}, {"copy_head": True}, {"copy_head": True, "cca_layers": []}]
)
def test_untrained_model_is_its_gpt2_to_the_bit(tmp_path, implementation, with_neighbors, readers):
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=32, n_head=4, vocab_size=VOCAB, n_positions=64)).eval()
    gpt2.save_pretrained(tmp_path)
    gpt2.set_attn_implementation(implementation)
    settings = {"chunk_size": 8, "attn_implementation": implementation}
    retro = RetroForCausalLM.from_pretrained(tmp_path, **settings, **readers).eval()
    assert retro.config.chunk_size == 8 and retro.config.neighbor_length == 16
    assert retro.config.cca_layers == readers.get("cca_layers", [5])
    tokens = torch.randint(0, VOCAB, (3, 40))
    neighbors = torch.randint(0, VOCAB, (3, 5, 2, 16)) if with_neighbors else None
    with torch.no_grad():
        assert torch.equal(retro(tokens, neighbor_ids=neighbors).logits, gpt2(tokens).logits)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (6, [5]),
        (12, [5, 8, 11]),
        (24, list(range(5, 24, 3))),
        (36, list(range(5, 36, 3))),
        (48, list(range(5, 48, 3))),
    ],
)
def test_every_gpt2_size_has_default_layers(layers, expected):
    assert RetroConfig(n_layer=layers).cca_layers == expected


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 4 * CHUNK, 5 * CHUNK + 2])
def test_agrees_with_the_slow_reference(model, length):
    tokens, neighbors = random_tokens(length, seed=length), RowNeighbors(length // CHUNK, seed=1, missing={1}).chunks
    scores = neighbor_scores(length // CHUNK)
    with torch.no_grad():
        expected = reference.log_probs(model, tokens, neighbors, scores[0])
        found = run(model, tokens, neighbors, neighbor_scores=scores).log_softmax(-1)
        torch.testing.assert_close(found, expected, atol=ATOL, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"cca_layers": [0]},
        {"encoder_cca_layers": []},
        {"encoder_cca_layers": [0, 1]},
        {"copy_head": False},
        {"cca_match": False},
        {"copy_head": False, "cca_match": False},
        {"cca_layers": []},
        {"match_length": 3, "match_scale": 20, "cca_match_output_scale": 2.0, "gate_log_prob_scale": 5.0},
    ],
)
def test_agrees_with_the_slow_reference_with_other_settings(changes):
    model = small_model(**changes)
    tokens, neighbors = random_tokens(3 * CHUNK + 1, seed=5), RowNeighbors(3, seed=2).chunks
    scores = neighbor_scores(3)
    with torch.no_grad():
        expected = reference.log_probs(model, tokens, neighbors, scores[0])
        found = run(model, tokens, neighbors, neighbor_scores=scores).log_softmax(-1)
        torch.testing.assert_close(found, expected, atol=ATOL, rtol=1e-5)


def test_no_position_sees_a_later_token(model):
    tokens, neighbors = random_tokens(4 * CHUNK + 1, seed=3), RowNeighbors(4, seed=3).chunks
    ids, mask = neighbor_tensors([neighbors], 4)
    embeds = model.transformer.wte(torch.tensor([tokens])).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, neighbor_ids=ids, neighbor_attention_mask=mask).logits[0]
    for i in range(len(tokens)):
        (grad,) = torch.autograd.grad(logits[i].sum(), embeds, retain_graph=True)
        assert grad[0, i + 1 :].abs().max().item() == 0 if i + 1 < len(tokens) else True
        assert grad[0, i].abs().max() > 0


def test_a_position_sees_only_neighbors_of_complete_chunks(model):
    """Chunk u's neighbors reach exactly the positions from the chunk's last token on."""
    num_chunks = 4
    tokens, neighbors = random_tokens(num_chunks * CHUNK + 2, seed=4), RowNeighbors(num_chunks, seed=4).chunks
    before = run(model, tokens, neighbors)
    for chunk in range(num_chunks):
        changed = copy.deepcopy(neighbors)
        changed[chunk] = [[(token + 1) % VOCAB for token in neighbor] for neighbor in changed[chunk]]
        differs = (run(model, tokens, changed) - before).abs().amax(-1) > 1e-7
        first_reader = (chunk + 1) * CHUNK - 1
        assert not differs[:first_reader].any()
        assert differs[first_reader : first_reader + CHUNK].all()


def test_gradients_reach_the_neighbors_of_all_complete_chunks(model):
    tokens = random_tokens(3 * CHUNK, seed=6)
    ids, mask = neighbor_tensors([RowNeighbors(3, seed=6).chunks], 3)
    seen = {}
    model.transformer.wte.register_forward_hook(
        lambda module, args, out: seen.setdefault("neighbors", out.detach().requires_grad_()) if out.ndim == 5 else None
    )
    logits = model(torch.tensor([tokens]), neighbor_ids=ids, neighbor_attention_mask=mask).logits[0]
    for i in range(len(tokens)):
        (grad,) = torch.autograd.grad(logits[i].sum(), seen["neighbors"], retain_graph=True, allow_unused=True)
        reach = grad[0].abs().amax((1, 2, 3)) > 0  # (chunks,)
        complete = (i + 1) // CHUNK
        assert reach.tolist() == [chunk < complete for chunk in range(3)]
        assert grad[0][~mask[0]].abs().max() == 0  # masked tokens have no influence at all


def test_rows_do_not_mix(model):
    rows = [RowNeighbors(3, seed=seed).chunks for seed in (1, 2)]
    ids, mask = neighbor_tensors(rows, 3)
    tokens = torch.tensor([random_tokens(3 * CHUNK, seed=1), random_tokens(3 * CHUNK, seed=2)])
    embeds = model.transformer.wte(tokens).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, neighbor_ids=ids, neighbor_attention_mask=mask).logits
    (grad,) = torch.autograd.grad(logits[0].sum(), embeds)
    assert grad[1].abs().max() == 0


def test_masked_neighbors_have_no_influence(model):
    tokens = random_tokens(3 * CHUNK + 1, seed=7)
    ids, mask = neighbor_tensors([{}], 3)
    without = model(torch.tensor([tokens]), use_retrieval=False).logits
    masked = model(torch.tensor([tokens]), neighbor_ids=ids, neighbor_attention_mask=mask).logits
    assert torch.equal(masked, without)
    masked.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_use_retrieval_false_ignores_given_neighbors(model):
    tokens, neighbors = random_tokens(3 * CHUNK, seed=8), RowNeighbors(3, seed=8).chunks
    off = run(model, tokens, neighbors, use_retrieval=False)
    assert torch.equal(off, model(torch.tensor([tokens])).logits[0])
    model.config.use_retrieval = False
    assert torch.equal(run(model, tokens, neighbors), off)
    assert not torch.allclose(run(model, tokens, neighbors, use_retrieval=True), off)


def test_cross_attentions_are_over_the_neighbors_of_each_tokens_chunk():
    model = small_model()
    tokens, neighbors = random_tokens(3 * CHUNK, seed=9), RowNeighbors(3, seed=9, missing={1}).chunks
    ids, mask = neighbor_tensors([neighbors], 3)
    output = model(torch.tensor([tokens]), neighbor_ids=ids, neighbor_attention_mask=mask, output_attentions=True)
    assert len(output.cross_attentions) == 2 and len(output.attentions) == model.config.n_layer
    for weights in output.cross_attentions:
        assert weights.shape == (1, model.config.n_head, len(tokens), NEIGHBORS * LENGTH)
        for i in range(len(tokens)):
            chunk = (i + 1) // CHUNK - 1
            reads = chunk >= 0 and bool(neighbors[chunk])
            torch.testing.assert_close(weights[0, :, i].sum(-1), torch.full((2,), float(reads)))
            if reads:
                assert (weights[0, :, i][:, ~mask[0, chunk].flatten()] == 0).all()


def test_freeze_backbone_trains_only_the_new_parameters(tmp_path):
    model = small_model()
    model.freeze_backbone()
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=16, n_head=2, vocab_size=VOCAB, n_positions=64))
    backbone = {name for name, _ in gpt2.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters()} - backbone
    assert backbone < {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("sizes", "decoder", "new"),
    [
        ({"n_layer": 12, "n_embd": 768, "n_head": 12}, 124_439_808, 23_732_736),
        ({"n_layer": 48, "n_embd": 1600, "n_head": 25}, 1_557_611_200, 225_686_400),
    ],
)
def test_freeze_backbone_trains_as_many_parameters_as_documented(sizes, decoder, new):
    with torch.device("meta"):
        model = RetroForCausalLM(RetroConfig(**sizes))
    model.freeze_backbone()
    assert model.num_parameters(only_trainable=True) == new
    assert model.num_parameters() - new == decoder


def test_after_retrofitting_without_retrieval_it_is_its_gpt2_to_the_bit(tmp_path):
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=16, n_head=2, vocab_size=VOCAB, n_positions=64)).eval()
    gpt2.save_pretrained(tmp_path)
    settings = {"chunk_size": CHUNK, "num_neighbors": NEIGHBORS, "neighbor_length": LENGTH, "cca_layers": [1, 3]}
    model = RetroForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", **settings)
    model.freeze_backbone()
    tokens = torch.tensor([random_tokens(3 * CHUNK, seed=4)])
    ids, mask = neighbor_tensors([RowNeighbors(3, seed=4).chunks], 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    model.train()
    for _ in range(3):
        model(tokens, neighbor_ids=ids, neighbor_attention_mask=mask, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    original = dict(gpt2.named_parameters())
    assert all(torch.equal(value, original[name]) for name, value in model.named_parameters() if name in original)
    gpt2.set_attn_implementation("eager")
    expected = gpt2(tokens).logits
    assert torch.equal(model(tokens, use_retrieval=False).logits, expected)
    read = model(tokens, neighbor_ids=ids, neighbor_attention_mask=mask).logits
    assert not torch.allclose(read[:, CHUNK:], expected[:, CHUNK:], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_masked_neighbors_is_finite(model, dtype):
    tokens, neighbors = random_tokens(3 * CHUNK, seed=9), RowNeighbors(3, seed=9, missing={0, 2}).chunks
    logits = run(model.to(dtype), tokens, neighbors)
    assert logits.isfinite().all()
    logits.float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


class TestBadInput:
    tokens = torch.tensor([random_tokens(2 * CHUNK, seed=1)])

    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [
            ((1, 2, NEIGHBORS, LENGTH + 1), torch.int64),
            ((1, 2, NEIGHBORS + 1, LENGTH), torch.int64),
            ((1, 3, NEIGHBORS, LENGTH), torch.int64),
            ((2, 2, NEIGHBORS, LENGTH), torch.int64),
            ((2, NEIGHBORS, LENGTH), torch.int64),
            ((1, 2, NEIGHBORS, LENGTH), torch.float32),
        ],
    )
    def test_neighbor_tensors_of_wrong_shape_or_dtype(self, shape, dtype):
        with pytest.raises(ValueError, match="neighbor_ids") as error:
            small_model()(self.tokens, neighbor_ids=torch.zeros(shape, dtype=dtype))
        assert str(shape) in str(error.value) or str(dtype) in str(error.value)

    def test_mask_of_another_shape(self):
        ids, mask = neighbor_tensors([{}], 2)
        with pytest.raises(ValueError, match="neighbor_attention_mask has shape"):
            small_model()(self.tokens, neighbor_ids=ids, neighbor_attention_mask=mask[:, :1])

    def test_a_sequence_past_n_positions(self):
        with pytest.raises(ValueError, match="65 tokens.* 64 positions"):
            small_model()(torch.zeros(1, 65, dtype=torch.long))

    def test_generation_past_n_positions_is_refused_before_it_starts(self):
        with pytest.raises(ValueError, match="68 tokens.* 64 positions"):
            small_model().generate(self.tokens, max_new_tokens=60)

    @pytest.mark.parametrize(
        "changes",
        [
            {"cca_layers": [4]},
            {"cca_layers": [-1]},
            {"cca_layers": []},
            {"cca_layers": [1, 1]},
            {"encoder_cca_layers": [2]},
            {"chunk_size": 0},
            {"num_neighbors": 0},
            {"match_length": 0},
            {"match_scale": 0.0},
            {"cca_match_output_scale": -1.0},
            {"gate_log_prob_scale": 0.0},
            {"initial_match_weights": [1.0, 2.0]},
        ],
    )
    def test_a_setting_outside_its_bounds_is_named(self, changes):
        ((name, _),) = changes.items()
        with pytest.raises(Exception, match=name):
            RetroConfig(n_layer=4, **changes)

    def test_a_checkpoint_of_another_architecture(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        with pytest.raises(ValueError, match="'bert'"):
            RetroForCausalLM.from_pretrained(tmp_path)
