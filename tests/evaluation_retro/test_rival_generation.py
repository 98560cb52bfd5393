"""Rivals generate the tokens of slow loops, which read everything again for each token."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from evaluation_retro.key_building import KeySettings, build_keys
from evaluation_retro.knn_lm import KnnSettings
from evaluation_retro.rival_generation import generate_in_context, generate_knn, generate_replug

from ..support.by_hand import PROMPTS, HashRetriever, left_padded
from ..support.decoders import small_decoder
from ..support.retro_models import CHUNK, LENGTH, NEIGHBORS, VOCAB, random_tokens

NEW = 7
SEPARATOR = [5, 6]


class SparseRetriever(HashRetriever):
    """A fake knowledge base without a second neighbor or without any for some queries."""

    def retrieve(self, chunks, exclude_doc_ids=None):
        found = super().retrieve(chunks)
        self.excluded = exclude_doc_ids
        for place, query in enumerate(self.calls[-1]):
            there = sum(query) % 3
            found.attention_mask[place, there:] = False
            found.scores[place, there:] = torch.nan
        return found


def small_gpt2():
    """Build a GPT-2 that would end its texts: most tokens are end-of-text to it."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5)
    model = GPT2LMHeadModel(config).eval()
    model.generation_config.eos_token_id = list(range(40))
    return model


@pytest.fixture(scope="module", params=["gpt2", "llama", "mistral"])
def decoder(request):
    return small_gpt2() if request.param == "gpt2" else small_decoder(request.param)


@pytest.fixture(params=[1, len(PROMPTS)], ids=["one row", "left-padded rows"])
def prompts(request):
    return PROMPTS[: request.param]


@torch.no_grad()
def next_probabilities(decoder, tokens):
    return decoder(torch.tensor([tokens]), use_cache=False).logits[0, -1].double().softmax(-1)


def found_by_hand(retriever, text):
    """Return (neighbor, score) for what the last chunk of a text finds, best first."""
    found = retriever.retrieve([text[-CHUNK:]])
    places = [place for place in range(NEIGHBORS) if found.attention_mask[0, place].any()]
    return [
        (found.ids[0, place][found.attention_mask[0, place]].tolist() + SEPARATOR, float(found.scores[0, place]))
        for place in places
    ]


def written_by_hand(decoder, prompt, stride, max_tokens, distribution):
    """Write token by token; every `stride` of them search, and choose what stays in the window."""
    text = list(prompt)
    for number in range(NEW):
        if number % stride == 0:
            found = found_by_hand(SparseRetriever(), text)
            read = len(text) + min(stride, NEW - number) - 1  # tokens of text when the last one is predicted
        text.append(int(distribution(decoder, text, found, read, max_tokens).argmax()))
    return text[len(prompt) :]


def in_context(decoder, text, found, read, max_tokens):
    before = [token for neighbor, _ in reversed(found) for token in neighbor]
    begin = 0 if max_tokens is None else max(0, len(before) + read - max_tokens)
    return next_probabilities(decoder, before + text[begin:])


def replug(decoder, text, found, read, max_tokens):
    total = sum(math.exp(score) for _, score in found)
    parts = []
    for neighbor, score in found or [([], 0.0)]:
        begin = 0 if max_tokens is None else max(0, len(neighbor) + read - max_tokens)
        share = math.exp(score) / total if found else 1.0
        parts.append(share * next_probabilities(decoder, neighbor + text[begin:]))
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize(("stride", "max_tokens"), [(CHUNK, None), (3, 21), (1, None)])
@pytest.mark.parametrize(("generate", "distribution"), [(generate_in_context, in_context), (generate_replug, replug)])
def test_tokens_equal_a_slow_loop(decoder, prompts, generate, distribution, stride, max_tokens):
    inputs, retriever = left_padded(prompts), SparseRetriever()
    settings = {"stride": stride, "separator": SEPARATOR, "max_tokens": max_tokens}
    own = [{f"own {row}"} for row in range(len(prompts))]
    new = generate(decoder, retriever, **inputs, new_tokens=NEW, exclude_doc_ids=own, **settings)
    expected = [written_by_hand(decoder, prompt, stride, max_tokens, distribution) for prompt in prompts]
    assert new.tolist() == expected
    assert len(retriever.calls) == -(-NEW // stride)
    assert retriever.excluded == own


@pytest.mark.parametrize("stride", [CHUNK, 3])
def test_prompt_lookup_drafts_and_writes_the_same(decoder, stride):
    inputs = left_padded([random_tokens(4, seed=2) * 4])
    given = {**inputs, "new_tokens": NEW, "stride": stride}
    lengths: list[int] = []
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    plain = generate_in_context(decoder, SparseRetriever(), **given)
    longest = max(lengths)
    drafted = generate_in_context(decoder, SparseRetriever(), **given, prompt_lookup=True)
    hook.remove()
    assert torch.equal(drafted, plain)
    assert max(lengths) > longest


@pytest.mark.parametrize("generate", [generate_in_context, generate_replug])
def test_without_neighbors_the_decoder_generates_alone(decoder, prompts, generate):
    class Empty(HashRetriever):
        def retrieve(self, chunks, exclude_doc_ids=None):
            found = super().retrieve(chunks)
            found.attention_mask[:] = False
            found.scores[:] = torch.nan
            return found

    inputs = left_padded(prompts)
    new = generate(decoder, Empty(), **inputs, new_tokens=NEW)
    alone = decoder.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=VOCAB - 1)
    assert torch.equal(new, alone[:, -NEW:])


@pytest.fixture(scope="module")
def keys(decoder, tmp_path_factory):
    documents = [(f"doc {seed}", random_tokens(20, seed)) for seed in range(4)]
    file = tmp_path_factory.mktemp("keys") / "keys.db"
    store = build_keys(decoder, documents, KeySettings(str(file), key_window=20, key_context=0))
    yield documents, store
    store.close()


@torch.no_grad()
def last_state(decoder, tokens):
    states = decoder.base_model(torch.tensor([tokens]), use_cache=False).last_hidden_state
    return states[0, -1].double()


def test_knn_tokens_equal_brute_force(decoder, prompts, keys):
    documents, store = keys
    own = [{f"doc {row}"} if row % 2 else set() for row in range(len(prompts))]
    made = [
        (doc_id, last_state(decoder, tokens[: i + 1]), tokens[i + 1])
        for doc_id, tokens in documents
        for i in range(len(tokens) - 1)
    ]
    state = last_state(decoder, prompts[0])
    unit = sum(float((state - key).square().sum()) for _, key, _ in made) / len(made)
    knn = KnnSettings(5, 0.7, unit / 4)
    expected = []
    for prompt, excluded in zip(prompts, own, strict=True):
        text = list(prompt)
        for _ in range(NEW):
            state = last_state(decoder, text)
            others = [(float((state - key).square().sum()), token) for doc, key, token in made if doc not in excluded]
            votes = [(math.exp(-distance / knn.temperature), token) for distance, token in sorted(others)[: knn.k]]
            mixed = (1 - knn.weight) * next_probabilities(decoder, text)
            for vote, token in votes:
                mixed[token] += knn.weight * vote / sum(vote for vote, _ in votes)
            text.append(int(mixed.argmax()))
        expected.append(text[len(prompt) :])
    new = generate_knn(decoder, store, knn, **left_padded(prompts), new_tokens=NEW, exclude_doc_ids=own)
    assert new.tolist() == expected
    alone = generate_knn(decoder, store, KnnSettings(5, 1e-9, unit), **left_padded(prompts), new_tokens=NEW)
    assert alone.tolist() != expected


def test_bad_strides_and_windows_are_refused(decoder):
    inputs = left_padded(PROMPTS[:1])
    with pytest.raises(ValueError, match=f"stride is {CHUNK + 1}. Give a number from 1 to the knowledge base's chunk"):
        generate_in_context(decoder, HashRetriever(), **inputs, new_tokens=2, stride=CHUNK + 1)
    with pytest.raises(ValueError, match=r"The neighbors have \d+ tokens, and 4 tokens of text must follow them"):
        generate_in_context(decoder, HashRetriever(), **inputs, new_tokens=5, max_tokens=LENGTH + 3)
