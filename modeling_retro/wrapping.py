"""Opening a decoder other than GPT-2, and building RETRO around it.

`AutoModelForCausalLM` opens the decoder, so that whatever it can do (GGUF files, quantization,
device maps, renamed weights) is done as for the decoder alone.
"""

from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.quantizers.base import get_keys_to_not_convert

from configuration_retro import FOLLOWED_SETTINGS, RetroConfig

from .attention_branch import find_layers
from .library import CACHE, argument_names

DECODER = "transformer.decoder"  # where the decoder is in a RetroForCausalLM
PARTS = ("transformer.encoder", "transformer.cross_attention", "copy_head")  # what RETRO adds
RETRO_SETTINGS = {field.name for field in fields(RetroConfig)} - {field.name for field in fields(GPT2Config)}
# beside another decoder than GPT-2, what is not its own of GPT-2's settings is RETRO's, too
OWN_SETTINGS = {field.name for field in fields(RetroConfig)} - {field.name for field in fields(PreTrainedConfig)}
OWN_SETTINGS -= FOLLOWED_SETTINGS.keys()
UNQUANTIZED = ("llm_int8_skip_modules", "modules_to_not_convert")  # settings of quantizers: modules left as they are
QUANTIZER_STATE = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_8bit", "is_loaded_in_4bit")


def open_decoder(name: Any, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Open a causal language model as it is; return it and the library's loading report.

    A GGUF file's weights are dequantized, so the model is saved like any other.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **kwargs)
    decoder, info = loaded
    if kwargs.get("gguf_file") is not None:
        decoder.hf_quantizer = None
        decoder.is_quantized = False
        if hasattr(decoder.config, "quantization_config"):
            del decoder.config.quantization_config
    return decoder, info


def check_decoder_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of a decoder, if it keeps a cache of earlier tokens.

    Raises:
        ValueError: it keeps a state of them instead, or takes no cache; names the class.
    """
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if model._is_stateful:
        reason = "keeps a state of all earlier tokens instead of a cache of each"
    elif CACHE not in argument_names(model.forward):
        reason = f"takes no {CACHE}"
    else:
        return model
    raise ValueError(
        f"{model.__name__} {reason}, so RETRO cannot be built on it. Give a decoder whose layers are all attention, "
        "such as Llama, Qwen3 or GPT-2."
    )


def wrap_decoder(
    cls: type[PreTrainedModel],
    name: Any,
    config: RetroConfig | None,
    kwargs: dict[str, Any],
    text_config: PreTrainedConfig,
) -> tuple[Any, dict[str, Any]]:
    """Open a decoder and build a `RetroForCausalLM` around it.

    Args:
        cls: `RetroForCausalLM`, or a class of its own that extends it.
        config: where RETRO's settings are from. Default: their defaults.
        kwargs: RETRO's settings, which win, and arguments of the decoder's `from_pretrained`.
        text_config: the decoder's own configuration, unless the arguments have another.

    Returns:
        the model, and the loading report; RETRO's own parameters are missing keys.
    """
    settings = {} if config is None else {field: v for field, v in config.to_dict().items() if field in OWN_SETTINGS}
    settings |= {field: kwargs.pop(field) for field in OWN_SETTINGS & kwargs.keys()}
    if config is not None:
        kwargs["config"] = config.text_config
    # refuse settings that do not fit before the weights are read
    RetroConfig(**settings | {"text_config": deepcopy(kwargs.get("config") or text_config)})
    decoder, info = open_decoder(name, kwargs)
    if not Path(str(name)).exists():
        settings["base_model"] = str(name)  # record hub names only; local paths are private
    config = RetroConfig(**settings | {"text_config": decoder.config})
    config.name_or_path, config.dtype = decoder.config.name_or_path, decoder.config.dtype
    model: Any = cls(config, decoder=decoder)
    if model.generation_config is not None:
        model.generation_config = decoder.generation_config
    _place_parts(model, decoder)
    _take_over_quantization(model, decoder)
    own = {name for name, _ in model.named_parameters() if not name.startswith(f"{DECODER}.")}
    for part in ("missing_keys", "unexpected_keys"):
        info[part] = {f"{DECODER}.{key}" for key in info[part]}
    info["missing_keys"] |= own
    return model.eval(), info


def unquantized_modules(decoder: PreTrainedModel) -> list[str]:
    """Return the modules of a `RetroForCausalLM` that stay as they are when it is quantized."""
    return sorted({*PARTS, *(f"{DECODER}.{name}" for name in get_keys_to_not_convert(decoder))})


def leave_parts_unquantized(quantization: Any, config: RetroConfig) -> None:
    """Name RETRO's parts among the modules that a quantization leaves as they are.

    Args:
        quantization: a `BitsAndBytesConfig` or the like, which is changed.
        config: the model's.
    """
    with torch.device("meta"):
        names = unquantized_modules(AutoModelForCausalLM.from_config(config.text_config))
    _leave_unquantized(quantization, names)


def _leave_unquantized(quantization: Any, names: list[str], prefix: str = "") -> None:
    """Add modules to those that a quantization leaves as they are, which get a prefix."""
    for setting in UNQUANTIZED:
        if hasattr(quantization, setting):
            kept = [f"{prefix}{name}" for name in getattr(quantization, setting) or ()]
            setattr(quantization, setting, sorted({*names, *kept}))


def _place_parts(model: Any, decoder: PreTrainedModel) -> None:
    """Move what RETRO adds to the devices and the type of what it works with in the decoder."""
    embed: Any = decoder.get_input_embeddings()
    dtype = embed.weight.dtype if embed.weight.dtype.is_floating_point else decoder.dtype
    modules: dict[str, tuple[nn.Module, nn.Module]] = {}  # name of a part -> the part, and what it works with
    if model.config.copy_head:
        modules["copy_head"] = model.copy_head, embed
    if model.config.cca_layers:
        layers = find_layers(decoder)
        modules["transformer.encoder"] = model.transformer.encoder, layers[min(model.config.cca_layers)]
        for layer in model.config.cca_layers:
            part = model.transformer.cross_attention[str(layer)]
            modules[f"transformer.cross_attention.{layer}"] = part, layers[layer]
    device_map = getattr(decoder, "hf_device_map", None)
    is_dispatched = device_map is not None and (len(set(device_map.values())) > 1 or "disk" in device_map.values())
    for part, neighbor in modules.values():
        device = _device(neighbor)
        part.to(device=device, dtype=dtype)
        if is_dispatched:
            from accelerate.hooks import AlignDevicesHook, add_hook_to_module  # the library asks for it only here

            add_hook_to_module(part, AlignDevicesHook(execution_device=device, io_same_device=True))
    if device_map is not None:
        model.hf_device_map = {f"{DECODER}.{name}".rstrip("."): device for name, device in device_map.items()}
        model.hf_device_map |= {name: _device(neighbor) for name, (_, neighbor) in modules.items()}


def _device(module: nn.Module) -> torch.device:
    """Return the device that a module runs on, even if its weights are elsewhere until it runs."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


def _take_over_quantization(model: Any, decoder: PreTrainedModel) -> None:
    """Let the whole model know how its decoder is quantized: Trainer, PEFT and saving ask it."""
    quantization = getattr(decoder.config, "quantization_config", None)
    if quantization is None:
        return
    for name in QUANTIZER_STATE:
        if hasattr(decoder, name):
            setattr(model, name, getattr(decoder, name))
    _leave_unquantized(quantization, unquantized_modules(decoder), f"{DECODER}.")
    model.config.quantization_config = quantization
    del decoder.config.quantization_config
