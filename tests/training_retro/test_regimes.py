"""Each regime trains the parameters that it should, on texts of any length."""

import json
import math

import datasets
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import train_hf
import training_retro
from modeling_retro import RetroForCausalLM

from ..support.runs import OVERRIDES, flags, knowledge_base, losses, train
from ..support.training_world import CHUNK

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 needs a GPU")


def test_retro_learning_rate_applies_to_what_retro_adds(world, tokenizer_folder, tmp_path):
    trainer = train(
        flags(world, tokenizer_folder, tmp_path, max_steps=1, retro_learning_rate=0.25, **knowledge_base(world)),
        tmp_path,
    )
    rates = {
        name: (group["initial_lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for name, parameter in trainer.model.named_parameters()
        if any(parameter is other for other in group["params"])
    }
    assert set(rates) == {name for name, _ in trainer.model.named_parameters()}
    for name, parameter in trainer.model.named_parameters():
        added = any(part in name for part in (".cca.", ".ln_cca.", ".encoder."))
        assert rates[name] == (0.25 if added else 5e-3, 0.1 if parameter.ndim > 1 else 0.0), name


@pytest.mark.parametrize(("smoothing", "skips"), [(0.0, {True}), (0.1, {None})])
def test_training_computes_no_logits_that_nobody_reads(
    world, tokenizer_folder, tmp_path, smoothing, skips, monkeypatch
):
    found = set()
    forward = RetroForCausalLM.forward

    def watched(model, *args, skip_logits=None, **kwargs):
        outputs = forward(model, *args, skip_logits=skip_logits, **kwargs)
        if model.training:
            found.add(skip_logits)
            assert (outputs.logits is None) == bool(skip_logits)
        return outputs

    monkeypatch.setattr(RetroForCausalLM, "forward", watched)
    settings = {"label_smoothing_factor": smoothing, **knowledge_base(world)}
    train(flags(world, tokenizer_folder, tmp_path, max_steps=1, **settings), tmp_path)
    assert found == skips


def test_adapters_train_with_what_is_new(world, tokenizer_folder, tmp_path):
    """New parts of RETRO end in zeros, through which adapters alone would get no gradient."""
    settings = {"lora": "{r: 2, target_modules: [c_attn, q_attn]}", **knowledge_base(world)}
    settings["config_overrides"] = OVERRIDES.replace("}", ", copy_head: true}")
    trainer = train(flags(world, tokenizer_folder, tmp_path / "run", **settings), tmp_path / "c")
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    added = ("cca.", "encoder.", "copy_head.")
    assert all("lora_" in name or any(part in name for part in added) for name in trained)
    assert any(p.abs().max() > 0 for name, p in trainer.model.named_parameters() if "lora_B" in name)
    for end in ("copy_head.modules_to_save.default.gate_scale", "cca.modules_to_save.default.c_proj.weight"):
        assert any(name.endswith(end) and p.any() for name, p in trainer.model.named_parameters())
    trainer.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()

    # On a RETRO that has learned to read, only the adapters are trained.
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    settings |= {"model_name_or_path": tmp_path / "merged", "config_overrides": None}
    again = train(flags(world, tokenizer_folder, tmp_path / "again", **settings), tmp_path / "c2")
    assert all("lora_" in name for name, p in again.model.named_parameters() if p.requires_grad)


def test_defaults_are_those_of_gpt2s_pretraining(world, tokenizer_folder, tmp_path):
    arguments = flags(world, tokenizer_folder, tmp_path, learning_rate=None, max_steps=200)
    _, _, training = training_retro.parse_arguments(arguments)
    assert (training.learning_rate, training.weight_decay, training.adam_beta2) == (6e-4, 0.1, 0.95)
    assert training.max_grad_norm == 1.0 and training.get_warmup_steps(200) == 2
    trainer = train(arguments, tmp_path / "c")
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert max(rates) == 6e-4 and abs(rates[-1] - 6e-5) < 1e-6  # cosine to a tenth


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=needs_gpu)])
def test_half_precision_and_gradient_checkpointing_train(world, tokenizer_folder, tmp_path, precision):
    use_cpu = str(precision == "bf16").lower()
    changes = {precision: "true", "use_cpu": use_cpu, "gradient_checkpointing": "true", **knowledge_base(world)}
    trainer = train(flags(world, tokenizer_folder, tmp_path, **changes), tmp_path / "c")
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_a_retrofit_changes_only_the_new_weights(world, tokenizer_folder, tokenizer, tmp_path):
    torch.manual_seed(0)
    eot = tokenizer.eos_token_id
    sizes = {"n_layer": 3, "n_embd": 32, "n_head": 2, "n_positions": 64, "bos_token_id": eot, "eos_token_id": eot}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes))
    gpt2.save_pretrained(tmp_path / "gpt2")
    arguments = flags(
        world,
        tokenizer_folder,
        tmp_path / "run",
        model_name_or_path=tmp_path / "gpt2",
        config_overrides=f"{{chunk_size: {CHUNK}, cca_layers: [1]}}",
        freeze_backbone="true",
        **knowledge_base(world),
    )
    trainer = train(arguments, tmp_path / "cache")
    trained = trainer.model.state_dict()
    for name, weight in gpt2.state_dict().items():
        assert torch.equal(trained[name], weight), name
    assert trained["transformer.h.1.cca.c_proj.weight"].abs().max() > 0
    tokens = torch.randint(0, len(tokenizer), (2, 20))
    model = trainer.model.eval()
    assert torch.allclose(model(tokens, use_retrieval=False).logits, gpt2.eval()(tokens).logits, atol=1e-6)


def test_batches_without_a_whole_chunk_train(world, tokenizer_folder, tmp_path):
    """The only sequence is shorter than a chunk, in training and in evaluation."""
    (tmp_path / "short.txt").write_text("ab")
    arguments = flags(
        world,
        tokenizer_folder,
        tmp_path / "run",
        train_data=tmp_path / "short.txt",
        validation_data=tmp_path / "short.txt",
        freeze_backbone="true",
        gradient_checkpointing="true",
        max_steps=2,
        **knowledge_base(world),
    )
    trainer = train(arguments, tmp_path / "c")
    assert {len(row["input_ids"]) < CHUNK for row in trainer.train_dataset} == {True}
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    with pytest.raises(SystemExit, match="block_size is 7; it must be from 8"):
        train_hf.main([*arguments, "--block_size", "7"])


def test_short_documents_and_blocks_with_a_partial_chunk_train(world, tokenizer_folder, tmp_path):
    (tmp_path / "short.jsonl").write_text("\n".join(json.dumps({"text": "ab"}) for _ in range(40)))
    trainer = train(
        flags(
            world,
            tokenizer_folder,
            tmp_path / "run",
            train_data=tmp_path / "short.jsonl",
            block_size=27,
            **knowledge_base(world),
        ),
        tmp_path / "c",
    )
    assert isinstance(trainer.train_dataset, datasets.Dataset) and len(trainer.train_dataset[0]["input_ids"]) == 27
    assert all(torch.isfinite(torch.tensor(losses(trainer))))
