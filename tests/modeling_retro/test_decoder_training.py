"""Other decoders train with checkpointing, in half precision, quantized, placed and compiled."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, PeftModel, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from modeling_retro import RetroForCausalLM
from modeling_retro.neighbor_encoder import RetroEncoderLayer

from ..support.by_hand import PROMPTS, HashRetriever, greedy_by_hand, left_padded
from ..support.decoders import (
    COPYING,
    NO_DROPOUT,
    READING,
    SIZES,
    SOME,
    added_parameters,
    open_decoder,
    retrieving_retro,
    retro,
    small_decoder,
)
from ..support.retro_models import VOCAB, open_weights
from .test_placement import dequantized
from .test_training_features import assert_same, checkpoint, gradients, training_batch

TWO = ["gemma3", "gpt_neox"]  # with sliding windows, and with parallel layers
STRICT = {"atol": 1e-5, "rtol": 1e-4}


def test_gradient_checkpointing_changes_no_gradient(folder):
    model, batch = retro(folder).train(), training_batch()
    expected = gradients(model, batch)
    assert all(gradient.any() for name, gradient in expected[1].items() if "decoder." not in name)

    passes = []
    layers = [m for m in model.modules() if isinstance(m, RetroEncoderLayer) or type(m).__name__.endswith("MLP")]
    for module in layers:
        module.register_forward_pre_hook(lambda *_: passes.append(1))
    gradients(model, batch)
    once = len(passes)
    checkpoint(model, use_reentrant=False)
    passes.clear()
    assert_same(gradients(model, batch), expected, **STRICT)
    assert len(passes) > once  # layers were computed again


@pytest.mark.parametrize("family", SOME, indirect=True)
def test_reentrant_checkpointing_is_right_or_refused(folder):
    model, batch = retro(folder, **COPYING).train(), training_batch()
    expected = gradients(model, batch)
    checkpoint(model, use_reentrant=True)
    assert_same(gradients(model, batch), expected, **STRICT)
    with pytest.raises(ValueError, match="use_reentrant.*False"):
        checkpoint(retro(folder), use_reentrant=True)


@pytest.mark.parametrize("family", SOME, indirect=True)
def test_a_model_in_training_with_checkpointing_generates_the_same_text(folder):
    model = retrieving_retro(folder, **NO_DROPOUT)
    prompt, settings = torch.tensor([PROMPTS[2]]), {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(prompt, **settings)
    checkpoint(model.train(), use_reentrant=False)
    assert torch.equal(model.generate(prompt, **settings), expected)


@pytest.mark.parametrize("family", SOME, indirect=True)
def test_half_precision_stays_finite_and_near_float32(folder):
    error = 25 * torch.finfo(torch.bfloat16).eps
    model, batch = retro(folder, **NO_DROPOUT).train(), training_batch()
    model.freeze_backbone()
    expected = gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = gradients(model, batch)
    half = gradients(copy.deepcopy(model).to(torch.bfloat16), batch)
    for loss, found in (autocast, half):
        assert loss.sub(expected[0]).abs() < error
        assert all(gradient.isfinite().all() for gradient in found.values())
        differences = {name: gradient.float() - expected[1][name] for name, gradient in found.items()}
        assert norm(differences) < error * norm(expected[1])


def norm(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()


QUANTIZED = (Linear4bit, Linear8bitLt)
# sizes that the kernels take
LARGER = {"hidden_size": 64, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 64, "ffn_dim": 64}


def in_full_precision(model, folder):
    """Return the same decoder in full precision, with RETRO's parts as they are built."""
    plain = RetroForCausalLM.from_pretrained(folder, attn_implementation="eager", **SIZES, **READING).train()
    plain.freeze_backbone()
    for name, module in model.named_modules():
        if isinstance(module, QUANTIZED):
            plain.get_submodule(name).weight.data.copy_(dequantized(module))
    return plain


@pytest.mark.parametrize(
    ("settings", "error"),
    [({"load_in_4bit": True}, 1e-4), ({"load_in_8bit": True}, 0.3)],  # 8 bits quantize activations, too
    ids=["4bit", "8bit"],
)
@pytest.mark.parametrize("family", SOME, indirect=True)
def test_a_quantized_decoder_gets_parts_in_full_precision(family, tmp_path, settings, error):
    small_decoder(family, **LARGER, word_embed_proj_dim=64).save_pretrained(tmp_path / "decoder")
    quantization = {"quantization_config": BitsAndBytesConfig(**settings), "attn_implementation": "eager"}
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder", **quantization)
    model = RetroForCausalLM.from_pretrained(tmp_path / "decoder", **SIZES, **READING, **quantization)
    plain = in_full_precision(model, tmp_path / "decoder")
    quantized = {name for name, m in model.transformer.decoder.named_modules() if isinstance(m, QUANTIZED)}
    assert quantized == {name for name, m in decoder.named_modules() if isinstance(m, QUANTIZED)}
    assert len(quantized) == sum(isinstance(m, QUANTIZED) for m in model.modules()) > 0
    assert {p.dtype for p in added_parameters(model).values()} == {torch.float32}
    batch = training_batch()
    del batch["attention_mask"]
    expected = decoder(batch["input_ids"]).logits
    assert torch.equal(model(**batch).logits, expected)
    open_weights(model, added_parameters(model).values(), noise=0.2)
    assert torch.equal(model(**batch, use_retrieval=False).logits, expected)
    model.freeze_backbone()
    _, found = gradients(model.train(), batch)
    assert set(found) == set(added_parameters(model))
    for name, parameter in added_parameters(model).items():
        plain.get_parameter(name).data.copy_(parameter.data)
    _, exact = gradients(plain, batch)
    for name, gradient in found.items():
        assert (gradient - exact[name]).norm() / exact[name].norm() < error, name
    model.eval().save_pretrained(tmp_path / "saved")
    opened = RetroForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    assert {p.dtype for p in added_parameters(opened).values()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(opened(**batch).logits, model(**batch).logits)
    model.set_retriever(HashRetriever())
    assert model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=6, do_sample=False).shape[1] > len(PROMPTS[0])


PARTS = ["transformer.encoder", "transformer.cross_attention", "copy_head"]


@pytest.mark.parametrize("family", TWO, indirect=True)
@pytest.mark.parametrize("place", ["auto", "little memory", "disk"])
@torch.no_grad()
def test_a_model_placed_by_a_device_map_is_the_same_model(folder, tmp_path, place):
    model = retrieving_retro(folder)
    model.save_pretrained(tmp_path / "model", max_shard_size="5KB")
    placement = {
        "auto": {"device_map": "auto"},
        "little memory": {"device_map": "auto", "max_memory": {"cpu": 25_000}},
        "disk": {"device_map": {"transformer.decoder": "disk", **dict.fromkeys(PARTS, "cpu")}},
    }[place]
    placed = RetroForCausalLM.from_pretrained(
        tmp_path / "model",
        retriever=HashRetriever(),
        attn_implementation="eager",
        offload_folder=tmp_path / "offload",
        **placement,
    )
    assert any(p.is_meta for p in placed.parameters()) == (place in ("little memory", "disk"))
    batch = training_batch()
    assert torch.equal(placed(**batch).logits, model(**batch).logits)
    sequences = placed.generate(**left_padded(PROMPTS), max_new_tokens=4, do_sample=False)
    for prompt, row in zip(PROMPTS, sequences.tolist(), strict=True):
        assert row[-4 - len(prompt) :] == greedy_by_hand(model, prompt, 4)


@pytest.mark.parametrize("family", TWO, indirect=True)
@pytest.mark.parametrize("max_memory", [None, {"cpu": 8_000}], ids=["all", "part"])
@torch.no_grad()
def test_a_decoder_may_be_placed_while_retro_is_built_on_it(folder, tmp_path, max_memory):
    batch, model = training_batch(), retro(folder)
    expected = open_decoder(folder)(batch["input_ids"]).logits
    placement = {"device_map": "auto", "max_memory": max_memory, "offload_folder": tmp_path}
    placed = RetroForCausalLM.from_pretrained(folder, attn_implementation="eager", **SIZES, **READING, **placement)
    assert any(p.is_meta for p in placed.parameters()) == (max_memory is not None)
    assert not any(p.is_meta for p in added_parameters(placed).values())
    assert torch.equal(placed(batch["input_ids"], neighbor_ids=batch["neighbor_ids"]).logits, expected)
    for name, parameter in added_parameters(model).items():
        placed.get_parameter(name).copy_(parameter)
    assert torch.equal(placed(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("family", SOME, indirect=True)
def test_threads_do_not_mix_their_neighbors(folder):
    model = retro(folder)
    batches = [training_batch(seed) for seed in range(4)]
    batches[3] |= {"use_retrieval": False}
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches]
    together = Barrier(len(batches))

    def run(batch):
        found = []
        for _ in range(5):
            together.wait()
            with torch.no_grad():
                found.append(model(**batch).logits)
        return found

    with ThreadPoolExecutor(len(batches)) as pool:
        for wanted, found in zip(expected, pool.map(run, batches), strict=True):
            assert all(torch.equal(logits, wanted) for logits in found)


@pytest.mark.parametrize("family", SOME, indirect=True)
def test_a_failed_call_leaves_nothing_behind(folder):
    model, batch = retro(folder), training_batch()
    with torch.no_grad():
        expected = model(**batch).logits
        hook = model.transformer.get_output_embeddings().register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(**batch)
        hook.remove()
        decoder = open_decoder(folder)
        own = decoder(batch["input_ids"]).logits
        assert torch.equal(model.transformer.decoder(batch["input_ids"]).logits, own)  # it is still a decoder
        assert torch.equal(model(**batch).logits, expected)


@torch.no_grad()
def test_two_readers_may_share_a_decoder(folder):
    batch = training_batch()
    one, two = retro(folder, cca_layers=[1]), retro(folder, cca_layers=[1, 2])
    expected = [model(**batch).logits for model in (one, two)]
    decoder = open_decoder(folder)
    for model, logits in zip((one, two), expected, strict=True):
        shared = RetroForCausalLM(model.config, decoder=decoder).eval()
        for name, parameter in added_parameters(model).items():
            shared.get_parameter(name).copy_(parameter)
        assert torch.equal(shared(**batch).logits, logits)
        model.shared = shared
    assert torch.equal(one.shared(**batch).logits, expected[0])


def fail(*_):
    raise ZeroDivisionError


@pytest.mark.parametrize("family", ["gpt_neox"], indirect=True)
def test_a_compiled_training_step_is_one_graph(folder):
    model = retro(folder, "sdpa", **NO_DROPOUT).train()
    model.freeze_backbone()
    uncompiled, counter = copy.deepcopy(model), CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counter)  # fullgraph: a graph break is an error
    for seed in range(2):
        batch = training_batch(seed)
        compiled.zero_grad()
        loss = compiled(**batch).loss
        loss.backward()
        expected = gradients(uncompiled, batch)
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert_same((loss.detach(), found), expected, **STRICT)
    assert counter.frame_count == 1


@torch.no_grad()
def test_attention_may_be_set_afterwards(family, folder):
    batch = training_batch()
    del batch["attention_mask"]
    eager, sdpa = retro(folder, "eager"), retro(folder, "sdpa")
    expected = eager(**batch).logits
    torch.testing.assert_close(sdpa(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    sdpa.set_attn_implementation("eager")
    torch.testing.assert_close(sdpa(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    if family == "falcon":
        return  # the library sets it only when the model is built
    decoder, tokens = open_decoder(folder, "sdpa"), batch["input_ids"]
    eager.set_attn_implementation("sdpa")
    assert eager.transformer.decoder.config._attn_implementation == "sdpa"
    assert torch.equal(eager(tokens).logits, decoder(tokens).logits)


ADAPTERS = {
    "every projection": {"target_modules": "all-linear"},
    "whole parts": {
        "target_modules": r".*decoder.*(q_proj|query_key_value)",
        "modules_to_save": ["copy_head", "encoder"],
    },
}


# PEFT reads the name that transformers 5.24 renames
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", TWO, indirect=True)
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_trains_alone_and_loads_to_the_same_logits(folder, tmp_path, name):
    retro(folder).save_pretrained(tmp_path / "base")
    model = RetroForCausalLM.from_pretrained(tmp_path / "base")
    batch = training_batch()
    model = get_peft_model(model.train(), LoraConfig(task_type="CAUSAL_LM", r=2, **ADAPTERS[name]))
    trained = {key: weight.clone() for key, weight in model.named_parameters() if weight.requires_grad}
    assert any("lora" in key and ".decoder." in key for key in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {
        key for key, weight in model.named_parameters() if key in trained and not torch.equal(weight, trained[key])
    }
    assert changed == set(trained)
    with torch.no_grad():
        model.eval().save_pretrained(tmp_path / "adapter")
        expected = model(**batch).logits
        fresh = RetroForCausalLM.from_pretrained(tmp_path / "base", retriever=HashRetriever())
        loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
        assert torch.equal(loaded(**batch).logits, expected)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-4, rtol=1e-4)
        sequences = merged.generate(**left_padded(PROMPTS), max_new_tokens=4, do_sample=False, pad_token_id=VOCAB - 1)
        for prompt, row in zip(PROMPTS, sequences.tolist(), strict=True):
            assert row[-4 - len(prompt) :] == greedy_by_hand(merged, prompt, 4)
