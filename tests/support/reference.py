"""A slow and obvious RETRO from the paper's definitions, the truth that the model is held to.

It uses only a model's weights and settings. It takes one row without padding, and goes head by
head, chunk by chunk, neighbor by neighbor and query by query. `decoder_layers` has the layers of
decoders other than GPT-2.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def attend(queries, keys, values, num_heads, causal=False, bias=None):
    """Return multi-head attention of queries (Q, d) to keys and values (K, d).

    A bias (heads, K) is added to the scores.
    """
    head_dim = queries.shape[-1] // num_heads
    rows = []
    for i, query in enumerate(queries):
        last = i + 1 if causal else len(keys)
        heads = []
        for h in range(num_heads):
            part = slice(h * head_dim, (h + 1) * head_dim)
            scores = torch.stack([query[part] @ key[part] for key in keys[:last]]) / math.sqrt(head_dim)
            if bias is not None:
                scores = scores + bias[h]
            heads.append((scores.softmax(0).unsqueeze(1) * values[:last, part]).sum(0))
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def norm(module, states):
    if isinstance(module, nn.RMSNorm):
        return module.weight * states / (states.square().mean(-1, keepdim=True) + module.eps).sqrt()
    return F.layer_norm(states, states.shape[-1:], module.weight, module.bias, module.eps)


def linear(module, states):  # GPT-2's Conv1D
    return states @ module.weight + module.bias


def self_attention(module, states, causal):
    query, key, value = linear(module.c_attn, states).chunk(3, dim=-1)
    return linear(module.c_proj, attend(query, key, value, module.num_heads, causal))


def cross_attention(module, states, others, bias=None, output_scale=1.0):
    key, value = linear(module.c_attn, others).chunk(2, dim=-1)
    output = attend(linear(module.q_attn, states), key, value, module.num_heads, bias=bias)
    return linear(module.c_proj, output_scale * output)


def mlp(module, states):
    return linear(module.c_proj, F.gelu(linear(module.c_fc, states), approximate="tanh"))


def encode(model, neighbor, query_states):
    """Encode one neighbor, a list of tokens, given its query's decoder states (1 to m, d)."""
    config, encoder = model.config, model.transformer.encoder
    e = model.get_input_embeddings()(torch.tensor(neighbor)) + encoder.wpe.weight[: len(neighbor)]
    for number, layer in enumerate(encoder.layers):
        e = e + self_attention(layer.self_attention, norm(layer.ln_1, e), causal=False)
        if number in config.encoder_cca_layers:
            query = norm(layer.ln_chunk, query_states)
            e = e + cross_attention(layer.cross_attention, norm(layer.ln_cross, e), query)
        e = e + mlp(layer.mlp, norm(layer.ln_2, e))
    return norm(encoder.ln_f, e)


def match(wte, tokens, i, neighbor, j, length):
    """Return how well the last 1, 2, … length of tokens[: i + 1] match those before neighbor[j]."""
    matches, product = [], 1.0
    for s in range(length):
        both = i - s >= 0 and j - 1 - s >= 0
        cosine = F.cosine_similarity(wte[tokens[i - s]], wte[neighbor[j - 1 - s]], dim=0) if both else 0.0
        product = product * max(0.0, float(cosine))
        matches.append(product)
    return torch.tensor(matches)


def copy_probabilities(model, tokens, i, neighbors, scores):
    """Return the copy distribution (V,) after tokens[: i + 1], and the gate's features."""
    head, wte, scale = model.copy_head, model.get_input_embeddings().weight, model.config.match_scale
    places = []  # (matches of 1, 2, … tokens, attention score, number of the neighbor, token)
    for number, neighbor in enumerate(neighbors):
        for j, token in enumerate(neighbor):
            matches = match(wte, tokens, i, neighbor, j, len(head.match))
            score = scale * ((head.match * matches).sum() + head.similarity[0] * scores[number])
            places.append((matches, score, number, token))
    attention = torch.stack([place[1] for place in places]).softmax(0)
    by_neighbor = torch.zeros(len(neighbors), len(wte))
    for weight, (_, _, number, token) in zip(attention, places, strict=True):
        by_neighbor[number, token] += weight
    copied = by_neighbor.sum(0)
    pairs = [(a, b) for a in range(len(neighbors)) for b in range(len(neighbors)) if a != b]
    agreement = sum(float((by_neighbor[a] * by_neighbor[b]).sum()) for a, b in pairs)
    similarity = sum(float(weight * scores[place[2]]) for weight, place in zip(attention, places, strict=True))
    matched = sum(weight * place[0] for weight, place in zip(attention, places, strict=True))
    return copied, torch.cat([matched, torch.tensor([float((copied**2).sum()), agreement, similarity])])


def point_read(points, i):
    """Return the number of the point whose neighbors token i reads, None before the first."""
    return max((u for u, point in enumerate(points) if point <= i + 1), default=None)


def with_copying(model, hidden, logits, tokens, points, neighbors, scores):
    """Return log-probabilities (T, V) of the mixture, given the decoder's states and logits."""
    mixed, head, config = [], model.copy_head, model.config
    for i in range(len(tokens)):
        log_probs = logits[i].log_softmax(-1)
        c = point_read(points, i)
        if c is not None and neighbors.get(c):
            copied, features = copy_probabilities(model, tokens, i, neighbors[c], scores[c])
            expected_log_prob = (copied * log_probs).sum() / config.gate_log_prob_scale
            features = torch.cat([features, expected_log_prob[None]])
            from_features = config.match_scale * (features @ head.gate_features + head.gate_bias)
            log_odds = hidden[i] @ head.gate_hidden + from_features
            odds = head.gate_scale.clamp(min=0) * log_odds.exp()
            gate = odds / (1 + odds)
            log_probs = ((1 - gate) * log_probs.exp() + gate * copied).log()
        mixed.append(log_probs)
    return torch.stack(mixed)


class NeighborReader:
    """The neighbors of one row, encoded in the first layer with cross-attention.

    Arguments are those of `log_probs`.
    """

    def __init__(self, model, tokens, neighbors, points):
        self.model, self.tokens, self.neighbors, self.points = model, tokens, neighbors, points
        self.encoded = {}

    def encode(self, h):
        """Encode all neighbors, given the decoder's states (T, d) of the row."""
        for u, point in enumerate(self.points):
            query_states = h[max(point - self.model.config.chunk_size, 0) : point]
            self.encoded[u] = [encode(self.model, neighbor, query_states) for neighbor in self.neighbors.get(u, [])]

    def read(self, number, ln_cca, cca, h):
        """Return the cross-attention (T, d) of layer `number`, 0 where there is nothing to read."""
        config = self.model.config
        if number == min(config.cca_layers):
            self.encode(h)
        rows = []
        for i in range(len(self.tokens)):
            c = point_read(self.points, i)
            if c is None or not self.encoded[c]:
                rows.append(torch.zeros_like(h[i]))
                continue
            matched = {}
            if config.cca_match:
                places = [(neighbor, j) for neighbor in self.neighbors[c] for j in range(len(neighbor))]
                matched["bias"] = config.match_scale * cca.match @ self._matches(i, places, cca.match.shape[1]).T
                matched["output_scale"] = config.cca_match_output_scale
            query = norm(ln_cca, h[i : i + 1])
            rows.append(cross_attention(cca, query, torch.cat(self.encoded[c]), **matched)[0])
        return torch.stack(rows)

    def _matches(self, i, places, length):
        wte = self.model.get_input_embeddings().weight
        return torch.stack([match(wte, self.tokens, i, *place, length) for place in places])


def gpt2(model, tokens, reader):
    """Return the last hidden states (T, d) and the logits (T, V) of RETRO on GPT-2."""
    decoder, config = model.transformer, model.config
    h = decoder.wte.weight[tokens] + decoder.wpe.weight[: len(tokens)]
    for number, block in enumerate(decoder.h):
        h = h + self_attention(block.attn, norm(block.ln_1, h), causal=True)
        if number in config.cca_layers:
            h = h + reader.read(number, block.ln_cca, block.cca, h)
        h = h + mlp(block.mlp, norm(block.ln_2, h))
    hidden = norm(decoder.ln_f, h)
    return hidden, hidden @ decoder.wte.weight.T


def log_probs(model, tokens, neighbors, scores, points=None, run=gpt2):
    """Return log-probabilities (len(tokens), V) of the next tokens.

    Args:
        tokens: list of ids.
        neighbors: number of a point -> list of neighbors, each a list of ids.
        scores: number of a point -> similarity of each neighbor.
        points: numbers of tokens after which there is a point. Default: after each chunk.
        run: runs the layers as `gpt2` does, for another decoder.
    """
    m = model.config.chunk_size
    points = range(m, len(tokens) + 1, m) if points is None else points
    hidden, logits = run(model, tokens, NeighborReader(model, tokens, neighbors, points))
    if not model.config.copy_head:
        return logits.log_softmax(-1)
    return with_copying(model, hidden, logits, tokens, points, neighbors, scores)
