"""RETRO for one row, written slowly and obviously from the paper's definitions: the truth that the model is held to.

Takes the weights of a RetroForCausalLM and nothing else of it. One row without padding, one head at a time, one chunk at
a time, one neighbour at a time, one query at a time.
"""

import math

import torch
import torch.nn.functional as F


def attend(queries, keys, values, num_heads, causal=False):
    """queries (Q, d), keys and values (K, d): multi-head attention, head by head, query by query."""
    head_dim = queries.shape[-1] // num_heads
    rows = []
    for i, query in enumerate(queries):
        last = i + 1 if causal else len(keys)
        heads = []
        for h in range(num_heads):
            part = slice(h * head_dim, (h + 1) * head_dim)
            scores = torch.stack([query[part] @ key[part] for key in keys[:last]]) / math.sqrt(head_dim)
            heads.append((scores.softmax(0).unsqueeze(1) * values[:last, part]).sum(0))
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def norm(module, states):
    return F.layer_norm(states, states.shape[-1:], module.weight, module.bias, module.eps)


def linear(module, states):  # GPT-2's Conv1D
    return states @ module.weight + module.bias


def self_attention(module, states, num_heads, causal):
    query, key, value = linear(module.c_attn, states).chunk(3, dim=-1)
    return linear(module.c_proj, attend(query, key, value, num_heads, causal))


def cross_attention(module, states, others, num_heads):
    key, value = linear(module.c_attn, others).chunk(2, dim=-1)
    return linear(module.c_proj, attend(linear(module.q_attn, states), key, value, num_heads))


def mlp(module, states):
    return linear(module.c_proj, F.gelu(linear(module.c_fc, states), approximate="tanh"))


def encode(model, neighbor, chunk_states):
    """One neighbour's tokens (list) and its chunk's decoder states (m, d) -> (tokens, d)."""
    config, encoder = model.config, model.transformer.encoder
    e = model.transformer.wte.weight[neighbor] + encoder.wpe.weight[: len(neighbor)]
    for number, layer in enumerate(encoder.layers):
        e = e + self_attention(layer.self_attention, norm(layer.ln_1, e), config.n_head, causal=False)
        if number in config.encoder_cca_layers:
            chunk = norm(layer.ln_chunk, chunk_states)
            e = e + cross_attention(layer.cross_attention, norm(layer.ln_cross, e), chunk, config.n_head)
        e = e + mlp(layer.mlp, norm(layer.ln_2, e))
    return norm(encoder.ln_f, e)


def logits(model, tokens, neighbors):
    """tokens: list of ids; neighbors: chunk number -> list of neighbours, each a list of ids. Returns (len(tokens), V)."""
    config, m = model.config, model.config.chunk_size
    encoded = {}
    h = model.transformer.wte.weight[tokens] + model.transformer.wpe.weight[: len(tokens)]
    for number, block in enumerate(model.transformer.h):
        h = h + self_attention(block.attn, norm(block.ln_1, h), config.n_head, causal=True)
        if number == min(config.cca_layers):
            for u in range(len(tokens) // m):  # complete chunks
                encoded[u] = [encode(model, neighbor, h[u * m : (u + 1) * m]) for neighbor in neighbors.get(u, [])]
        if number in config.cca_layers:
            updated = []
            for i in range(len(tokens)):
                c = (i + 1) // m - 1
                if c >= 0 and encoded[c]:
                    query = norm(block.ln_cca, h[i : i + 1])
                    updated.append(h[i] + cross_attention(block.cca, query, torch.cat(encoded[c]), config.n_head)[0])
                else:
                    updated.append(h[i])
            h = torch.stack(updated)
        h = h + mlp(block.mlp, norm(block.ln_2, h))
    return norm(model.transformer.ln_f, h) @ model.transformer.wte.weight.T
