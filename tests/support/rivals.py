"""A small plain decoder, texts with neighbors of many lengths, and prompts built by definition."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, CHUNK, LENGTH, K, R = 50, 8, 33, 3, 12


def plain_decoder():
    """Build a decoder of two layers with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.5, **sizes)
    return LlamaForCausalLM(config).eval()


def texts_with_neighbors():
    """Return two rows, and their neighbors in up to 35 slots, some of them missing."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=generator)
    ids = torch.randint(VOCABULARY, (2, 35, K, R), generator=generator)
    lengths = torch.randint(0, R + 1, (2, 35, K, 1), generator=generator)
    mask = torch.arange(R) < lengths
    mask[0, 1] = False
    return tokens, ids, mask


def point_before(i, first_point, stride):
    """Return number and place of the last point at or before token i + 1, and the next place."""
    points = list(range(first_point, LENGTH + 1, stride))
    seen = [(number, point) for number, point in enumerate(points) if point <= i + 1]
    later = [point for point in points if point > i + 1] + [LENGTH]
    return (*(seen[-1] if seen else (None, None)), later[0])


def prompt_by_definition(tokens, i, neighbors, next_point, max_tokens=None):
    """Return the neighbors' tokens, then the text up to token i, its beginning cut off.

    So much is cut off that the longest prompt with these neighbors fits the window, the one that
    predicts the token before the next point.

    Args:
        neighbors: lists of tokens, in the order in which they stand there.
    """
    before = [token for neighbor in neighbors for token in neighbor]
    begin = 0
    if max_tokens is not None:
        last = min(next_point - 1, LENGTH - 1)  # tokens of the text in the longest prompt with these neighbors
        begin = max(0, len(before) + last - max_tokens)
    return before + tokens[begin : i + 1].tolist()
