"""Models that RETRO cannot be built on are refused, with the value and the remedy."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    LlavaConfig,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from modeling_retro import RetroConfig, RetroForCausalLM

from ..support.by_hand import HashRetriever, greedy_by_hand
from ..support.decoders import COMMON, COPYING, FAMILIES, SIZES, SOME, decoder_batch, open_decoder, retro
from ..support.retro_models import CHUNK, VOCAB, open_weights, random_tokens

TINY = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
REMEDY = "Give a decoder"


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (T5ForConditionalGeneration, "'t5'"),
        (BertForMaskedLM, "'bert'"),
        (MambaForCausalLM, "'mamba'.*'linear_attention'"),
    ],
)
def test_checkpoints_of_other_kinds_are_refused(model, reason, tmp_path):
    config = {
        T5ForConditionalGeneration: T5Config(vocab_size=VOCAB, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8),
        BertForMaskedLM: BertConfig(**TINY, intermediate_size=16),
        MambaForCausalLM: MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4),
    }[model]
    saved(model(config), tmp_path)
    for open_it in (RetroForCausalLM.from_pretrained, RetroConfig.from_pretrained):
        with pytest.raises(ValueError, match=f"{reason}.*{REMEDY}"):
            open_it(tmp_path)


# Types whose attention does not cache all earlier tokens, or that hold several models.
@pytest.mark.parametrize(
    "model_type",
    [
        "qwen3_next",
        "qwen3_5_text",
        "mamba2",
        "falcon_mamba",
        "jamba",
        "bamba",
        "falcon_h1",
        "zamba2",
        "nemotron_h",
        "granitemoehybrid",
        "minimax",
        "rwkv",
        "xlstm",
        "recurrent_gemma",
    ],
)
def test_state_space_and_linear_attention_layers_are_refused(model_type):
    refused = pytest.raises(ValueError, match=f"(?i){model_type.replace('_', '_?')}.*{REMEDY}")
    with refused, torch.device("meta"):  # sizes are the defaults
        RetroForCausalLM(RetroConfig(text_config=AutoConfig.for_model(model_type)))


@pytest.mark.parametrize(
    "model_type", ["llava", "gemma3", "mllama", "bart", "whisper", "bert", "roberta", "vit", "nonsense"]
)
def test_a_configuration_without_one_causal_decoder_is_refused(model_type):
    for config in ({"model_type": model_type}, None):
        if config is None:
            if model_type == "nonsense":
                continue
            config = AutoConfig.for_model(model_type)
        with pytest.raises(ValueError, match=f"'{model_type}'.*{REMEDY}"):
            RetroConfig(text_config=config)


def test_a_multimodal_checkpoint_is_refused(tmp_path):
    LlavaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"'llava'.*{REMEDY}"):
        RetroForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "model_type", ["gpt_neox", "opt", "mpt", "bloom", "qwen2", "gemma2", "phi", "gptj", "mixtral", "starcoder2"]
)
def test_every_decoder_keeps_the_copy_head(model_type):
    with torch.device("meta"):
        model = RetroForCausalLM(RetroConfig(text_config=AutoConfig.for_model(model_type)))
    assert model.config.text_config.model_type == model_type and hasattr(model, "copy_head")


@pytest.mark.parametrize("layers", [[3], [-1], [0, 3], [1, 1]], ids=str)
@pytest.mark.parametrize("family", SOME)
def test_layers_beyond_the_depth_are_refused_before_the_weights_load(tmp_path, family, layers):
    FAMILIES[family]().save_pretrained(tmp_path)  # there are no weights
    with pytest.raises(StrictDataclassError, match="cca_layers=.*(There are 3 layers, 0 to 2|twice)"):
        RetroForCausalLM.from_pretrained(tmp_path, cca_layers=layers)


@pytest.mark.parametrize("settings", [{"cca_layers": [3]}, {"num_neighbors": 0}, {"search": "x"}], ids=str)
def test_settings_are_refused_before_weights_are_read(saved_decoder, tmp_path, settings):
    AutoConfig.from_pretrained(saved_decoder("llama")).save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=next(iter(settings))):  # not: there are no weights
        RetroForCausalLM.from_pretrained(tmp_path, **settings)


def test_a_decoder_that_reads_in_no_way_is_refused(saved_decoder):
    with pytest.raises(StrictDataclassError, match="cca_layers is empty and copy_head is False"):
        RetroForCausalLM.from_pretrained(saved_decoder("llama"), copy_head=False)


def bloom():
    torch.manual_seed(0)
    settings = {name: COMMON[name] for name in ("vocab_size", "hidden_size", "bos_token_id", "eos_token_id")}
    config = BloomConfig(**settings, n_layer=2, n_head=2, pad_token_id=VOCAB - 1, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def test_a_structure_without_a_place_is_refused_for_cross_attention_alone(tmp_path):
    """Bloom adds the residual inside its attention."""
    saved(bloom(), tmp_path)
    with pytest.raises(ValueError, match=r"(?i)bloom.*cca_layers=\[\]"):
        RetroForCausalLM.from_pretrained(tmp_path, cca_layers=[1], **SIZES)
    model = RetroForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", **SIZES)
    decoder, inputs = open_decoder(tmp_path), decoder_batch()
    with torch.no_grad():
        expected = decoder(inputs["input_ids"]).logits
        assert torch.equal(model(**inputs).logits, expected)
        open_weights(model, model.copy_head.parameters(), noise=0.3)
        assert torch.equal(model(**inputs, use_retrieval=False).logits, expected)
        assert not torch.allclose(model(**inputs).logits, expected, atol=1e-3)
    model.set_retriever(HashRetriever())
    prompt = random_tokens(2 * CHUNK + 1, seed=1)
    written = model.generate(torch.tensor([prompt]), max_new_tokens=CHUNK + 1, do_sample=False)
    assert written[0].tolist() == greedy_by_hand(model, prompt, CHUNK + 1)


def test_a_norm_behind_the_residual_is_right_or_refused(tmp_path):
    """OPT-350m normalizes after adding the attention branch, and its embeddings are narrower."""
    torch.manual_seed(0)
    sizes = {"ffn_dim": 24, "word_embed_proj_dim": 8, "dropout": 0.0, "do_layer_norm_before": False}
    decoder = AutoModelForCausalLM.from_config(OPTConfig(**COMMON, **sizes), attn_implementation="eager").eval()
    saved(decoder, tmp_path)
    with pytest.raises(ValueError, match=r"(?i)opt.*cca_layers=\[\]"):
        RetroForCausalLM.from_pretrained(tmp_path, cca_layers=[1], **SIZES)
    model = retro(tmp_path, **COPYING, cca_match=False)
    inputs = decoder_batch()
    with torch.no_grad():
        assert torch.equal(model(**inputs, use_retrieval=False).logits, decoder(inputs["input_ids"]).logits)
    model.set_retriever(HashRetriever())
    prompt = random_tokens(2 * CHUNK + 1, seed=1)
    written = model.generate(torch.tensor([prompt]), max_new_tokens=CHUNK + 1, do_sample=False)
    assert written[0].tolist() == greedy_by_hand(model, prompt, CHUNK + 1)


@pytest.mark.parametrize("family", SOME)
def test_a_knowledge_base_with_another_vocabulary_is_refused(saved_decoder, family):
    model, retriever = retro(saved_decoder(family)), HashRetriever()
    retriever.vocab_size = VOCAB + 9
    with pytest.raises(ValueError, match=f"{VOCAB + 9}.*{VOCAB}") as error:
        model.set_retriever(retriever)
    assert "tokenizer" in str(error.value)


def test_sizes_of_the_decoder_cannot_be_set(saved_decoder):
    with pytest.raises(ValueError, match="n_embd, vocab_size cannot be set"):
        RetroConfig.from_pretrained(saved_decoder("llama"), vocab_size=99, n_embd=32)


def test_generation_across_a_change_of_positions_is_refused(tmp_path):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "partial_rotary_factor": 1.0,
    }
    config = FAMILIES["phi3"]()
    config.rope_parameters, config.original_max_position_embeddings = rope, 16
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = RetroForCausalLM.from_pretrained(tmp_path, **SIZES)
    prompt = torch.tensor([random_tokens(12, seed=0)])
    with pytest.raises(ValueError, match="come to 24 tokens.*beyond 16.*use_cache=False"):
        model.generate(prompt, max_new_tokens=12, pad_token_id=0)
    assert model.generate(prompt, max_new_tokens=12, pad_token_id=0, use_cache=False).shape == (1, 24)
    assert model.generate(prompt, max_new_tokens=4, pad_token_id=0).shape == (1, 16)
