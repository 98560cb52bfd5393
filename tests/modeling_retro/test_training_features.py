"""Training features of the library: checkpointing, half precision, attention, compiled steps."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations import flash_attention

from modeling_retro import RetroForCausalLM
from modeling_retro.neighbor_encoder import RetroEncoderLayer

from ..support.retro_models import CHUNK, VOCAB, RowNeighbors, neighbor_scores, neighbor_tensors, small_model

LENGTH = 3 * CHUNK + 2


def training_batch(seed=0):
    """Rows padded on the left, on the right, throughout and not at all; some neighbors missing."""
    input_ids = torch.randint(0, VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(seed))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, : CHUNK + 1] = 0
    attention_mask[1, -3:] = 0
    attention_mask[2] = 0
    rows = [RowNeighbors(3, seed + row, missing={row % 2}).chunks for row in range(4)]
    neighbor_ids, neighbor_attention_mask = neighbor_tensors(rows, LENGTH // CHUNK)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[0, CHUNK + 1] = -100  # the prediction at padding does not count
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "neighbor_ids": neighbor_ids,
        "neighbor_attention_mask": neighbor_attention_mask,
        "neighbor_scores": torch.cat([neighbor_scores(LENGTH // CHUNK, row) for row in range(4)]),
        "labels": labels,
    }


def trained_model(**changes) -> RetroForCausalLM:
    return small_model(**changes).train()


def without_dropout(**changes) -> RetroForCausalLM:
    return trained_model(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, **changes)


def gradients(model, batch, seed=0):
    """Return the loss and the gradient of every trained parameter."""
    model.zero_grad()
    torch.manual_seed(seed)  # dropout
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(found, expected, **tolerance):
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    torch.testing.assert_close(found[1], expected[1], **tolerance)


def checkpoint(model, **settings):
    """Switch gradient checkpointing on, under its name in the installed transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings)


def test_a_model_in_training_with_checkpointing_generates_the_same_text():
    model = without_dropout()
    tokens = training_batch()["input_ids"]
    expected = model.generate(tokens, max_new_tokens=CHUNK, do_sample=False)
    checkpoint(model.train(), use_reentrant=False)
    assert torch.equal(model.generate(tokens, max_new_tokens=CHUNK, do_sample=False), expected)


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "retrofit"])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant, frozen):
    model = trained_model()
    if frozen:
        model.freeze_backbone()
    batch = training_batch()
    expected = gradients(model, batch)
    assert all(gradient.abs().max() > 0 for gradient in expected[1].values())

    passes = []
    for module in model.modules():
        if isinstance(module, RetroEncoderLayer):
            module.register_forward_pre_hook(lambda *_: passes.append(1))
    checkpoint(model, use_reentrant=use_reentrant)
    assert_same(gradients(model, batch), expected, atol=1e-6, rtol=1e-5)
    assert len(passes) > model.config.encoder_num_layers  # layers were computed again


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite_and_near_float32(dtype, attention):
    error = 25 * torch.finfo(dtype).eps  # 0.2 and 0.02
    model = without_dropout(attn_implementation=attention)
    batch = training_batch()
    expected = gradients(model, batch)
    with torch.autocast("cpu", dtype):
        autocast = gradients(model, batch)
    half = gradients(copy.deepcopy(model).to(dtype), batch)
    for loss, found in (autocast, half):
        assert loss.sub(expected[0]).abs() < error
        for name, gradient in found.items():  # NaN and infinity are near nothing
            distance = (gradient.float() - expected[1][name]).norm() / expected[1][name].norm()
            assert distance < error, name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_without_any_neighbor_is_finite_too(dtype, attention):
    model = without_dropout(attn_implementation=attention)
    batch = training_batch()
    batch["neighbor_attention_mask"] = torch.zeros_like(batch["neighbor_attention_mask"])
    with torch.autocast("cpu", dtype):
        loss, found = gradients(model, batch)
        plain = model(**(batch | {"use_retrieval": False}))
    torch.testing.assert_close(loss, plain.loss)
    assert plain.logits.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_sdpa_has_eager_attentions_gradients():
    batch = training_batch()
    eager, sdpa = (gradients(without_dropout(attn_implementation=name), batch) for name in ("eager", "sdpa"))
    assert_same(sdpa, eager, atol=1e-5, rtol=1e-4)


def flash_kernel(calls):
    """Return a function that computes flash attention and records its arguments."""

    def kernel(query, key, value, attention_mask, query_length, is_causal, dropout=0.0, softmax_scale=None, **_):
        calls.append((query, key, attention_mask, query_length, is_causal))
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
        if is_causal:
            mask = mask.tril()
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :].bool()
            mask = mask | ~mask.any(-1, keepdim=True)
        output = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=softmax_scale)
        return output.transpose(1, 2)

    return kernel


def test_flash_attention_gets_supported_arguments_and_gives_the_same_logits(monkeypatch):
    """Only the kernel is replaced, where transformers calls it, since it needs a GPU."""
    batch = training_batch()
    # the library refuses float32, which the kernel does not have
    model = small_model().double()
    expected = model(**batch)
    calls = []
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", flash_kernel(calls))
    model.config._attn_implementation = "flash_attention_2"  # setting it by name asks for the kernel
    found = model(**batch)

    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found.logits[real], expected.logits[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss)
    config = model.config
    encoder = config.encoder_num_layers + len(config.encoder_cca_layers)
    assert len(calls) == config.n_layer + encoder
    for query, key, attention_mask, query_length, is_causal in calls:
        assert query.ndim == 4 and query.shape[2:] == (config.n_head, config.n_embd // config.n_head)
        assert query_length == query.shape[1]
        if attention_mask is not None:  # padding of keys, where keys and queries are the same tokens
            assert attention_mask.shape == key.shape[:2] == query.shape[:2]
        if is_causal:
            assert query.shape[:2] == (4, LENGTH)
    assert sum(call[-1] for call in calls) == config.n_layer


@pytest.mark.parametrize(("attention", "padded"), [("sdpa", True), ("eager", False)])
def test_a_compiled_training_step_is_one_graph_for_all_steps(attention, padded):
    model = without_dropout(attn_implementation=attention, n_layer=3, cca_layers=[0, 2])
    uncompiled = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counter)  # fullgraph: a graph break is an error
    for seed in range(3):
        batch = training_batch(seed)
        if not padded:
            del batch["attention_mask"]
        compiled.zero_grad()
        loss = compiled(**batch).loss
        loss.backward()
        expected = gradients(uncompiled, batch)
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert_same((loss.detach(), found), expected, atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            for trained in (model, uncompiled):
                for name, parameter in trained.named_parameters():
                    parameter -= 0.01 * expected[1][name]
    assert counter.frame_count == 1


def test_a_resized_vocabulary_serves_decoder_neighbors_and_head():
    model = without_dropout()
    batch = training_batch()
    with torch.no_grad():
        before = model(**batch).logits
        model.copy_head.gate_scale.zero_()  # the gate sees the probabilities of new tokens too
        decoded = model(**batch).logits
        model.copy_head.gate_scale.fill_(0.5)
    model.resize_token_embeddings(VOCAB + 5)
    assert model.config.vocab_size == VOCAB + 5
    assert model.lm_head.weight is model.transformer.wte.weight
    with torch.no_grad():
        model.copy_head.gate_scale.zero_()
        torch.testing.assert_close(model(**batch).logits[..., :VOCAB], decoded)
        model.copy_head.gate_scale.fill_(0.5)

    batch["neighbor_ids"][3, 0, 0, 0] = VOCAB + 4
    batch["neighbor_attention_mask"][3, 0, 0, 0] = True
    logits = model(**batch).logits
    assert logits.shape[-1] == VOCAB + 5
    assert not torch.equal(logits[3, CHUNK:, :VOCAB], before[3, CHUNK:])
    batch["labels"][3, 1] = VOCAB + 4
    _, found = gradients(model, batch)
    assert found["transformer.wte.weight"][VOCAB + 4].abs().max() > 0


def test_head_and_embeddings_are_one_weight_through_saving_and_casting(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    for loaded in (
        RetroForCausalLM.from_pretrained(tmp_path),
        RetroForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).float(),
        copy.deepcopy(model),
    ):
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert "lm_head.weight" not in dict(loaded.named_parameters())
    model.tie_weights()
    assert model.lm_head.weight is model.transformer.wte.weight
