"""Ids that only pad the vocabulary are never generated, and change nothing else."""

import json

import pytest
import torch
from transformers import GenerationConfig

from modeling_retro import RetroForCausalLM
from modeling_retro.vocabulary import suppress_padding_ids
from training_retro.sampling import GenerateArguments, likeliest_tokens, load, sample

from ..support.runs import OVERRIDES, flags, train

PADDING = 64


@pytest.fixture
def padded(world, tokenizer_folder, tokenizer, tmp_path):
    """The folder of a trained model that would write padding ids alone, if it were free to."""
    overrides = OVERRIDES.replace("}", f", vocab_size: {len(tokenizer) + PADDING}, tie_word_embeddings: false}}")
    trainer = train(
        flags(world, tokenizer_folder, tmp_path / "run", config_overrides=overrides, max_steps=2), tmp_path / "c"
    )
    with torch.no_grad():
        trainer.model.transformer.ln_f.bias[:] = 1
        trainer.model.lm_head.weight[len(tokenizer) :] = 1
    trainer.save_model()
    return tmp_path / "run"


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 0, "temperature": 2.0, "num_return_sequences": 4},
        {"num_beams": 3, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": True},
        {"generation_config": GenerationConfig(do_sample=True)},
        {"do_sample": False, "prompt_lookup_num_tokens": 2},
    ],
    ids=["greedy", "sampling", "beams", "sampled_beams", "own_configuration", "prompt_lookup"],
)
def test_padding_is_never_generated(padded, tokenizer, settings):
    model = RetroForCausalLM.from_pretrained(padded)
    prompt = torch.tensor([tokenizer("the model reads")["input_ids"]])
    size = len(tokenizer)
    assert model(prompt).logits[0, -1].argmax() >= size  # it would be
    model.generation_config.max_new_tokens = 20
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    assert model.generate(prompt, **settings).max() < size
    model.generation_config.suppress_tokens = None
    assert model.generate(prompt, **settings).max() >= size


def test_generate_hf_asks_the_tokenizer(padded, tokenizer):
    """A model from elsewhere may not say which of its ids are padding."""
    file = padded / "generation_config.json"
    saved = json.loads(file.read_text())
    assert saved.pop("suppress_tokens") == list(range(len(tokenizer), len(tokenizer) + PADDING))
    file.write_text(json.dumps(saved))
    arguments = GenerateArguments(
        model=str(padded), prompt="the", max_new_tokens=5, temperature=0, show_likeliest=400, device="cpu"
    )
    model, opened = load(arguments)
    outputs = sample(model, opened, arguments)
    assert outputs.sequences.max() < len(tokenizer)
    for place in likeliest_tokens(model, outputs, 3)[0].values():
        assert max(token for token, _ in place.read + place.unread) < len(tokenizer)


def test_the_loss_is_that_of_all_ids(padded, tokenizer):
    model = RetroForCausalLM.from_pretrained(padded)
    tokens = torch.tensor([tokenizer("the model reads its neighbors")["input_ids"]])
    logits = model(tokens).logits[0, :-1]
    assert logits.shape[-1] == len(tokenizer) + PADDING and logits.isfinite().all()
    expected = torch.nn.functional.cross_entropy(logits, tokens[0, 1:])
    torch.testing.assert_close(model(tokens, labels=tokens).loss, expected)


def test_only_ids_without_a_token_are_suppressed(tokenizer, config):
    model = RetroForCausalLM(config)
    suppress_padding_ids(model, tokenizer)
    assert model.generation_config.suppress_tokens is None
    model.generation_config.suppress_tokens = [tokenizer.eos_token_id]
    suppress_padding_ids(model, tokenizer)
    assert model.generation_config.suppress_tokens == [tokenizer.eos_token_id]
    config.vocab_size += 8
    model = RetroForCausalLM(config)
    model.generation_config.suppress_tokens = [3]  # the user's own choice stays
    suppress_padding_ids(model, tokenizer)
    size = len(tokenizer)
    assert model.generation_config.suppress_tokens == [3, *range(size, size + 8)]
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer._tokenizer)
    tokenizer.add_tokens(["<new>", "<newer>"])
    suppress_padding_ids(model, tokenizer)
    assert model.generation_config.suppress_tokens == [3, *range(size + 2, size + 8)]
