"""Decoders other than GPT-2: which ones RETRO can be built on, and what it asks of them."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}  # kinds whose cache holds tokens

PARTS_OF_LAYERS = {"attn_config", "ffn_config"}  # settings in a configuration of their own

# setting of RetroConfig -> names of the decoder's setting that it follows, the first that exists
FOLLOWED_SETTINGS = {
    "vocab_size": ("vocab_size",),
    "n_embd": ("hidden_size",),
    "n_layer": ("num_hidden_layers",),
    "n_head": ("num_attention_heads",),
    "n_positions": ("max_position_embeddings", "max_seq_len", "seq_length"),
    "layer_norm_epsilon": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    "bos_token_id": ("bos_token_id",),
    "eos_token_id": ("eos_token_id",),
    "pad_token_id": ("pad_token_id",),
    "tie_word_embeddings": ("tie_word_embeddings",),
    "use_cache": ("use_cache",),
}
NO_LIMIT = 1 << 20  # positions of a decoder that names no largest number


def decoder_config(settings: dict[str, Any] | PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of a decoder, built from its settings and checked.

    Raises:
        ValueError: there is no such model, or RETRO cannot be built on it.
    """
    if isinstance(settings, PreTrainedConfig):
        config = settings
    else:
        check_model_type(settings.get("model_type"))
        config = AutoConfig.for_model(**settings)
    check_decoder(config)
    return config


def check_model_type(model_type: str | None) -> None:
    """Refuse models of a type that has no causal language model in transformers.

    Raises:
        ValueError: names the type.
    """
    if model_type == "retro" or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"A {model_type!r} model has no causal language-modeling head in transformers, so RETRO cannot be built on "
            "it. Give a decoder that AutoModelForCausalLM opens, such as Llama, Qwen3 or GPT-2."
        )


def check_decoder(config: PreTrainedConfig) -> None:
    """Refuse models that do not predict each token from a cache of all earlier ones.

    Raises:
        ValueError: names the model's type and what it lacks.
    """
    model_type = config.model_type
    check_model_type(model_type)
    layers = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    models = [name for name in config.sub_configs if name not in PARTS_OF_LAYERS and getattr(config, name, None)]
    if config.is_encoder_decoder:
        reason = "is an encoder-decoder"
    elif models:
        reason = f"is made of several models ({', '.join(models)}), such as text and images"
    elif model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        reason = "reads text in both directions (is_decoder=False)"
    elif layers:
        reason = f"has layers of the kind {', '.join(map(repr, sorted(layers)))}, which keep no token in the cache"
    else:
        return
    raise ValueError(
        f"A {model_type!r} model {reason}, so RETRO cannot be built on it. Give a decoder whose layers are all "
        "attention, such as Llama, Qwen3 or GPT-2."
    )


def followed_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings of RETRO that follow a decoder's, by name.

    The heads of RETRO's own attention are the decoder's, or the most below that divide the width.
    """
    followed: dict[str, Any] = {}
    for name, names in FOLLOWED_SETTINGS.items():
        values = [value for value in (getattr(config, other, None) for other in names) if value is not None]
        followed[name] = values[0] if values else None
    heads = followed["n_head"] or 1  # a model without attention is refused when it is built
    followed["n_head"] = next(number for number in range(heads, 0, -1) if followed["n_embd"] % number == 0)
    followed["n_positions"] = followed["n_positions"] or NO_LIMIT
    for name in ("layer_norm_epsilon", "tie_word_embeddings", "use_cache"):
        if followed[name] is None:
            del followed[name]  # RETRO's default
    return followed
