"""Slow references of decoders: their own layers, run by hand around cross-attention.

A layer's function gets the layer, its input h (T, d), `attend(module, states)` for its own
self-attention and `read(states)` for cross-attention, and returns the layer's output (T, d).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


def llama_layer(layer, h, attend, read):
    h = h + attend(layer.self_attn, layer.input_layernorm(h))
    h = h + read(h)
    return h + layer.mlp(layer.post_attention_layernorm(h))


def gemma3_layer(layer, h, attend, read):
    h = h + layer.post_attention_layernorm(attend(layer.self_attn, layer.input_layernorm(h)))
    h = h + read(h)
    return h + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(h)))


def olmo2_layer(layer, h, attend, read):
    h = h + layer.post_attention_layernorm(attend(layer.self_attn, h))
    h = h + read(h)
    return h + layer.post_feedforward_layernorm(layer.mlp(h))


def opt_layer(layer, h, attend, read):
    h = h + attend(layer.self_attn, layer.self_attn_layer_norm(h))
    h = h + read(h)
    return h + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(h))))


def gpt_neox_layer(layer, h, attend, read):
    attended = h + attend(layer.attention, layer.input_layernorm(h))
    attended = attended + read(attended)
    return attended + layer.mlp(layer.post_attention_layernorm(attended))


def parallel_gpt_neox_layer(layer, h, attend, read):
    attended = h + attend(layer.attention, layer.input_layernorm(h))
    return attended + layer.mlp(layer.post_attention_layernorm(h)) + read(attended)


def falcon_layer(layer, h, attend, read):
    normed = layer.input_layernorm(h)
    attended = h + attend(layer.self_attention, normed)
    return attended + layer.mlp(normed) + read(attended)


def phi_layer(layer, h, attend, read):
    normed = layer.input_layernorm(h)
    attended = h + attend(layer.self_attn, normed)
    return attended + layer.mlp(normed) + read(attended)


@dataclass(frozen=True)
class Structure:
    """Where a decoder keeps its parts, and how its layers run.

    Attributes:
        layer: one of the functions above.
        stack: the path of the module with the layers, in the causal language model.
        layers, norm: the names of the layers and of the last norm in it.
        attention: further arguments of self-attention.
    """

    layer: Callable
    stack: str = "model"
    layers: str = "layers"
    norm: str = "norm"
    attention: tuple = ()

    def run(self, decoder, model, tokens, reader):
        """Return the last hidden states (T, d) and the logits (T, V), without any cache.

        Args:
            decoder: the decoder's causal language model, opened apart from the RETRO.
            model: the RETRO, for the parts that it adds.
            tokens: list of ids.
            reader: a `reference.NeighborReader`.
        """
        stack = decoder.get_submodule(self.stack)
        positions = torch.arange(len(tokens))[None]
        h = decoder.get_input_embeddings()(torch.tensor(tokens))
        if hasattr(stack, "embed_positions"):
            h = h + stack.embed_positions.weight[positions[0] + stack.embed_positions.offset]
        for number, layer in enumerate(getattr(stack, self.layers)):
            kind = layer_type(decoder.config, number)
            settings = {"attention_mask": mask(len(tokens), window(decoder.config, kind)), **dict(self.attention)}
            if hasattr(stack, "rotary_emb"):
                by_type = (kind,) if decoder.config.model_type == "gemma3_text" else ()
                settings["position_embeddings"] = stack.rotary_emb(h[None], positions, *by_type)

            def attend(module, states, settings=settings):
                return module(states[None], **settings)[0][0]

            def read(states, number=number):
                if number not in model.config.cca_layers:
                    return torch.zeros_like(states)
                added = model.transformer.cross_attention[str(number)]
                return reader.read(number, added.ln_cca, added.cca, states)

            h = self.layer(layer, h, attend, read)
        hidden = getattr(stack, self.norm)(h)
        return hidden, decoder.get_output_embeddings()(hidden)


def layer_type(config, number):
    """Return the name of a layer's attention."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return types[number]
    return "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"


def window(config, kind):
    """Return the number of tokens that a token attends to, itself included."""
    return config.sliding_window if kind == "sliding_attention" else config.max_position_embeddings


def mask(length, width):
    """Return what to add to attention scores (1, 1, T, T)."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    allowed = (distance >= 0) & (distance < width)
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]
