"""Small random decoders of many families, and RETROs on them with random weights."""

import functools

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen3Config,
)

from modeling_retro import RetroForCausalLM

from . import reference
from .by_hand import HashRetriever
from .decoder_layers import (
    Structure,
    falcon_layer,
    gemma3_layer,
    gpt_neox_layer,
    llama_layer,
    olmo2_layer,
    opt_layer,
    parallel_gpt_neox_layer,
    phi_layer,
)
from .retro_models import (
    CHUNK,
    LENGTH,
    NEIGHBORS,
    VOCAB,
    RowNeighbors,
    neighbor_scores,
    neighbor_tensors,
    open_weights,
    random_tokens,
)

WINDOW = 8  # tokens of a sliding window
TEXT = 4 * CHUNK + 2  # tokens of a row, more than twice a window
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large, so that every path matters to the logits
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": VOCAB - 1,
}
GROUPED = {**COMMON, "intermediate_size": 24, "num_key_value_heads": 1}
NEOX = {**COMMON, "intermediate_size": 24, "hidden_dropout": 0.0}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES = {
    "llama": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "llama_untied": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=12, tie_word_embeddings=True),  # wider heads than the states
    "gemma3": lambda: Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=WINDOW, layer_types=MIXED),
    "olmo2": lambda: Olmo2Config(**GROUPED),
    "gpt_neox": lambda: GPTNeoXConfig(**NEOX, use_parallel_residual=True),
    "gpt_neox_sequential": lambda: GPTNeoXConfig(**NEOX, use_parallel_residual=False),
    "opt": lambda: OPTConfig(**COMMON, ffn_dim=24, word_embed_proj_dim=16, dropout=0.0),
    "falcon": lambda: FalconConfig(**COMMON, alibi=False, parallel_attn=True),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=WINDOW),
    "phi": lambda: PhiConfig(**{**GROUPED, "num_key_value_heads": 2}),  # one dropout in two places
    "phi3": lambda: Phi3Config(**GROUPED),
}
SLIDING = ["gemma3", "mistral"]
# One of each structure, for tests that are slow or where families hardly differ.
SOME = ["llama", "gemma3", "gpt_neox", "opt"]

_NEOX = {"stack": "gpt_neox", "norm": "final_layer_norm"}
STRUCTURES = {
    "gemma3": Structure(gemma3_layer),
    "olmo2": Structure(olmo2_layer),
    "gpt_neox": Structure(parallel_gpt_neox_layer, **_NEOX),
    "gpt_neox_sequential": Structure(gpt_neox_layer, **_NEOX),
    "opt": Structure(opt_layer, "model.decoder", norm="final_layer_norm"),
    "phi": Structure(phi_layer, norm="final_layernorm"),
    "falcon": Structure(falcon_layer, "transformer", "h", "ln_f", (("alibi", None),)),
}

# Ways in which a model reads its neighbors.
COPYING = {"cca_layers": [], "copy_head": True}
READING = {"cca_layers": [1, 2], "copy_head": True, "cca_match": True}
READERS = {
    "copy head": COPYING,
    "cross-attention": {"cca_layers": [0, 2], "copy_head": False},
    "all": READING,
}
SIZES = {"chunk_size": CHUNK, "num_neighbors": NEIGHBORS, "neighbor_length": LENGTH, "initializer_range": 0.3}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


def decoder_batch(rows=2):
    """Return rows of tokens with neighbors, some of which are missing."""
    ids, mask = neighbor_tensors([RowNeighbors(4, seed, missing={1}).chunks for seed in range(rows)], 4)
    return {
        "input_ids": torch.tensor([random_tokens(TEXT, seed) for seed in range(rows)]),
        "neighbor_ids": ids,
        "neighbor_attention_mask": mask,
        "neighbor_scores": torch.cat([neighbor_scores(4, seed) for seed in range(rows)]),
    }


def small_decoder(family, **changes):
    """Build a decoder with random weights, which biases and norms have, too."""
    torch.manual_seed(0)
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    decoder = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    decoder.generation_config.pad_token_id = VOCAB - 1
    return decoder


def open_decoder(folder, attention="eager"):
    """Open the saved decoder by itself, as transformers does."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()


def untrained_retro(folder, attention="eager", **settings):
    """Build a RETRO on the saved decoder."""
    return RetroForCausalLM.from_pretrained(folder, attn_implementation=attention, **{**SIZES, **settings}).eval()


def retro(folder, attention="eager", **settings):
    """Build a RETRO whose own weights are all away from their start. The decoder's are as saved."""
    torch.manual_seed(1)
    model = untrained_retro(folder, attention, **{**READING, **settings})
    open_weights(model, added_parameters(model).values(), noise=0.3)
    return model


def retrieving_retro(folder, **settings):
    """Build such a RETRO with a fake knowledge base."""
    model = retro(folder, **settings)
    model.set_retriever(HashRetriever())
    return model


def added_parameters(model):
    """Return what RETRO adds to the decoder: name -> parameter."""
    return {name: p for name, p in model.named_parameters() if not name.startswith("transformer.decoder.")}


def slow_log_probs(family, folder, model, tokens, neighbors, scores, points=None):
    """Return the slow reference's log-probabilities (T, V), from the decoder as it was saved."""
    structure = STRUCTURES.get(family, Structure(llama_layer))
    run = functools.partial(structure.run, open_decoder(folder))
    return reference.log_probs(model, tokens, neighbors, scores, points, run)
