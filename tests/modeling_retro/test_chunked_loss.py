"""The loss without logits is the loss with them, and so are its gradients, in less memory."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import weight_norm
from transformers.loss.loss_utils import ForCausalLMLoss

from modeling_retro import chunked_loss
from modeling_retro.chunked_loss import VocabularyTerms
from modeling_retro.neighbor_encoder import RetroEncoderLayer

from ..support.decoders import NO_DROPOUT, READERS, SOME, retro
from ..support.retro_models import LENGTH, VOCAB
from .test_training_features import assert_same, gradients, training_batch, without_dropout

STRICT = {"atol": 1e-5, "rtol": 1e-4}
NO_LOGITS = {"skip_logits": True}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(chunked_loss, "TOKENS_AT_ONCE", 7)


def slow_gradients(model, batch):
    """Return the loss of log-probabilities that the logits give, and every gradient."""
    model.zero_grad()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    log_probs = model(**inputs).logits.float().log_softmax(-1)
    labels = batch["labels"][:, 1:]
    own = log_probs[:, :-1].gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    loss = -own[labels != -100].mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "retrofit"])
@pytest.mark.parametrize("gate_scale", [0.5, 0.0, -0.5], ids=["open", "shut", "below_zero"])
def test_loss_and_gradients_are_those_of_the_logits(gate_scale, frozen):
    model, batch = without_dropout(), training_batch()
    model.copy_head.gate_scale.data.fill_(gate_scale)
    if frozen:
        model.freeze_backbone()
    expected = slow_gradients(model, batch)
    assert_same(gradients(model, batch | NO_LOGITS), expected, **STRICT)
    assert expected[1]["copy_head.gate_scale"].any()
    assert model(**batch, skip_logits=True).logits is None


def test_a_gate_that_is_sure_of_its_copies_is_finite():
    model, batch = without_dropout(), training_batch()
    model.copy_head.gate_bias.data.fill_(5.0)  # times 30: odds that float32 cannot hold
    expected = slow_gradients(model, batch)
    assert expected[0].isfinite()
    assert_same(gradients(model, batch | NO_LOGITS), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("copy_head", [True, False])
def test_arguments_of_the_loss_keep_their_meaning(copy_head):
    model, batch = without_dropout(copy_head=copy_head), training_batch()
    shifted = torch.randint(0, VOCAB, batch["labels"].shape, generator=torch.Generator().manual_seed(1))
    for arguments in (
        {"num_items_in_batch": 11},
        {"num_items_in_batch": torch.tensor(11)},
        {"shift_labels": shifted, "ignore_index": 3},
        {"labels": torch.full_like(batch["labels"], -100), "num_items_in_batch": 5},
    ):
        assert_same(gradients(model, batch | arguments | NO_LOGITS), gradients(model, batch | arguments), **STRICT)
    with torch.no_grad():
        for arguments in ({}, {"use_retrieval": False}):
            expected = model(**batch, **arguments).loss
            torch.testing.assert_close(model(**batch, **arguments, skip_logits=True).loss, expected)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("family", [*SOME, "phi"], indirect=True)  # phi's output embeddings have a bias
def test_other_decoders_have_the_same_loss_and_gradients(folder, reader):
    model, batch = retro(folder, **READERS[reader], **NO_DROPOUT).train(), training_batch()
    expected = slow_gradients(model, batch)
    assert_same(gradients(model, batch | NO_LOGITS), expected, **STRICT)


@pytest.mark.parametrize("family", ["gemma3"], indirect=True)
def test_a_decoder_that_caps_its_logits_keeps_them(folder):
    model, batch = retro(folder, **NO_DROPOUT).train(), training_batch()
    model.transformer.decoder.config.final_logit_softcapping = 2.0
    model.get_input_embeddings().weight.data[0] = 0.0  # as of a padding token
    expected = slow_gradients(model, batch)
    assert_same(gradients(model, batch | NO_LOGITS), expected, **STRICT)
    model.transformer.decoder.config.final_logit_softcapping = None
    assert slow_gradients(model, batch)[0].sub(expected[0]).abs() > 0.1


class _Doubled(nn.Linear):
    def forward(self, states):
        return 2 * super().forward(states)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")  # old heads have it
def test_other_heads_and_loss_functions_are_used_as_they_are():
    model, batch = without_dropout(), training_batch()
    model.loss_function = lambda *args, **kwargs: 3 * ForCausalLMLoss(*args, **kwargs)
    expected = gradients(model, batch)
    assert_same(gradients(model, batch | NO_LOGITS), expected, **STRICT)
    assert model(**batch, skip_logits=True).logits is None

    model = without_dropout()
    weight = model.lm_head.weight
    model.lm_head = _Doubled(*reversed(weight.shape), bias=False)
    model.lm_head.weight = weight
    assert_same(gradients(model, batch | NO_LOGITS), slow_gradients(model, batch), **STRICT)

    model = without_dropout()
    model.lm_head.weight = nn.Parameter(weight.detach().clone())  # untied, since a hook is to compute it
    model.lm_head = weight_norm(model.lm_head)
    found = gradients(model, batch | NO_LOGITS)
    assert_same(found, slow_gradients(model, batch), **STRICT)
    assert found[1]["lm_head.weight_g"].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float32_as_with_logits(dtype):
    model, batch = without_dropout(), training_batch()
    exact = gradients(model, batch)[1]

    def errors(arguments):
        with torch.autocast("cpu", dtype):
            found = gradients(model, batch | arguments)[1]
        return {name: (found[name] - exact[name]).norm() / exact[name].norm() for name in exact}

    with_logits, without = errors({}), errors(NO_LOGITS)
    for name in exact:
        assert without[name] < 2 * with_logits[name] + torch.finfo(dtype).eps, name
    half = without_dropout().to(dtype)
    loss = half(**batch, skip_logits=True).loss
    assert loss.dtype == torch.float32
    assert loss.sub(half(**batch).loss).abs() < 25 * torch.finfo(dtype).eps


def largest_allocation(model, batch):
    """Return the most bytes that an operation of a training step keeps or returns."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model(**batch).loss.backward()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("copy_head", [True, False])
def test_no_tensor_has_the_size_of_the_logits(copy_head):
    vocabulary = 5000
    model, batch = without_dropout(copy_head=copy_head, vocab_size=vocabulary, n_embd=4), training_batch()
    logits = batch["input_ids"].numel() * vocabulary * 4
    assert largest_allocation(model, batch) >= logits
    assert largest_allocation(model, batch | NO_LOGITS) < logits / 2


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own call
def test_a_compiled_step_without_logits_is_one_graph():
    model = without_dropout(n_layer=2, cca_layers=[0])
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in range(2):  # with other numbers of tokens that count
        batch = training_batch(seed)
        batch["labels"] = batch["labels"].masked_fill(batch["labels"] % 5 == seed, -100)
        expected = slow_gradients(model, batch)
        model.zero_grad()
        loss = compiled(**batch, skip_logits=True).loss
        loss.backward()
        assert_same((loss.detach(), {name: p.grad for name, p in model.named_parameters()}), expected, **STRICT)
    assert counter.frame_count == 1


def test_mistakes_are_named():
    model, batch = without_dropout(), training_batch()
    loss = model(**batch, skip_logits=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="skip_logits=False"):
        loss.backward()
    loss = model(**batch, skip_logits=True).loss
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, model.lm_head.weight, create_graph=True)
    with pytest.raises(ValueError, match="logits_to_keep is 2"):
        model(**batch, skip_logits=True, logits_to_keep=2)
    del batch["labels"]
    with pytest.raises(ValueError, match="no labels"):
        model(**batch, skip_logits=True)


# The encoder's share of a step


def encoded_lengths(model, batch):
    """Return the lengths of the neighbors that enter an encoder layer in a step, and its gradients.

    The layer is called once, whatever the neighbors: processes wait for each other's calls.
    """
    calls = []
    layer = next(module for module in model.modules() if isinstance(module, RetroEncoderLayer))
    hook = layer.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1:2] * len(args[0])))
    loss, found = gradients(model, batch)
    hook.remove()
    assert loss.isfinite() and len(calls) == 1
    return list(calls[0]), found


def test_only_real_neighbors_are_encoded_up_to_the_longest():
    model, batch = without_dropout(), training_batch()
    mask = batch["neighbor_attention_mask"]
    mask[..., -1] = False
    found, _ = encoded_lengths(model, batch)
    real = (mask * torch.arange(1, LENGTH + 1)).amax(-1).flatten()
    assert found == [int(real.max())] * int((real > 0).sum())
    assert len(found) < real.numel() and found[0] < LENGTH

    mask.fill_(True)
    assert encoded_lengths(model, batch)[0] == [LENGTH] * real.numel()


def test_without_any_neighbor_the_encoder_still_has_gradients():
    """Processes that train together wait for every parameter's gradient."""
    model, batch = without_dropout(), training_batch()
    batch["neighbor_attention_mask"].fill_(False)
    lengths, found = encoded_lengths(model, batch)
    assert lengths == [LENGTH]
    assert not any(gradient.any() for name, gradient in found.items() if ".encoder." in name)


def test_what_is_masked_within_a_neighbor_changes_nothing():
    model, batch = without_dropout(), training_batch()
    mask = batch["neighbor_attention_mask"]
    mask[..., 0] = False
    mask[..., 4:] = False
    assert set(encoded_lengths(model, batch)[0]) == {4}
    others = {**batch, "neighbor_ids": batch["neighbor_ids"].where(mask, torch.tensor(3))}
    assert_same(gradients(model, others), gradients(model, batch), **STRICT)


def test_a_gradient_too_large_for_half_precision_before_it_is_averaged():
    """The sum over all tokens does not fit into float16, and their mean does."""
    head = nn.Linear(8, 4, bias=False)
    states, targets = torch.full((1, 4096, 8), 60.0), torch.zeros(1, 4096, dtype=torch.long)
    with torch.autocast("cpu", torch.float16):
        terms = VocabularyTerms(head, states, targets)
    terms.attach((terms.log_sums - terms.target_logits).sum()).div(4096).backward()
    assert head.weight.grad.isfinite().all() and head.weight.grad.dtype == torch.float32
