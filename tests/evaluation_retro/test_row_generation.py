"""RETRO and the copy baseline generate the tokens of slow loops, which read all again each time."""

import pytest
import torch

from evaluation_retro.row_generation import generate_copying, generate_retro, generate_retro_in_context
from modeling_retro.retrieval_points import aligned_first_point

from ..support.by_hand import HashRetriever
from ..support.decoders import small_decoder
from ..support.retro_models import CHUNK, LENGTH, VOCAB, random_tokens, small_model

NEW, SEPARATOR = 7, [5, 6]
PROMPTS = torch.tensor([random_tokens(11, 0), random_tokens(11, 1)])


class SparseRetriever(HashRetriever):
    """A fake knowledge base without a second neighbor or without any for some queries."""

    def retrieve(self, chunks, exclude_doc_ids=None):
        found = super().retrieve(chunks)
        for place, query in enumerate(self.calls[-1]):
            there = sum(query) % 3
            found.attention_mask[place, there:] = False
            found.scores[place, there:] = torch.nan
        return found


class EchoRetriever(SparseRetriever):
    """A fake knowledge base whose second neighbor repeats the query and goes on."""

    def retrieve(self, chunks, exclude_doc_ids=None):
        found = super().retrieve(chunks)
        for place, query in enumerate(self.calls[-1]):
            echo = [*query, (sum(query) + 1) % VOCAB, query[-1]][-LENGTH:]
            found.ids[place, 1, : len(echo)] = torch.tensor(echo)
            found.attention_mask[place, 1] = torch.arange(LENGTH) < len(echo)
        return found


@torch.no_grad()
def next_probabilities(model, tokens, **arguments):
    return model(torch.tensor([tokens]), use_cache=False, **arguments).logits[0, -1].double().softmax(-1)


def written_by_hand(prompt, stride, distribution, retriever=SparseRetriever):
    text = list(prompt)
    for number in range(NEW):
        if number % stride == 0:
            found, searched = retriever().retrieve([text[-CHUNK:]]), len(text)
            count = min(stride, NEW - number)
        text.append(int(distribution(text, found, searched, searched + count - 1).argmax()))
    return text[len(prompt) :]


@pytest.fixture(scope="module", params=[{"cca_layers": []}, {}], ids=["copier", "attender"])
def model(request):
    return small_model(**request.param)


@pytest.mark.parametrize(("stride", "max_tokens"), [(CHUNK, None), (2, 21)])
def test_retro_in_context_tokens_equal_a_slow_loop(model, stride, max_tokens):
    def distribution(text, found, searched, read):
        shown = [ids[mask].tolist() for ids, mask in zip(found.ids[0], found.attention_mask[0], strict=True)]
        before = [token for tokens in reversed(shown) if tokens for token in [*tokens, *SEPARATOR]]
        begin = 0 if max_tokens is None else max(0, len(before) + read - max_tokens)
        point = len(before) + searched - begin
        first = aligned_first_point(point, CHUNK, CHUNK)
        slot = (point - first) // CHUNK
        ids = torch.zeros(1, slot + 1, *found.ids.shape[1:], dtype=torch.long)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        scores = torch.zeros(1, slot + 1, found.ids.shape[1])
        ids[0, slot], mask[0, slot], scores[0, slot] = found.ids[0], found.attention_mask[0], found.scores[0]
        arguments = {"neighbor_ids": ids, "neighbor_attention_mask": mask, "neighbor_scores": scores}
        if not before:
            arguments = {"use_retrieval": False}
        first_point = torch.tensor([first])
        return next_probabilities(model, before + text[begin:], first_point=first_point, **arguments)

    settings = {"stride": stride, "separator": SEPARATOR, "max_tokens": max_tokens}
    new = generate_retro_in_context(model, SparseRetriever(), PROMPTS, NEW, **settings)
    assert new.tolist() == [written_by_hand(prompt, stride, distribution) for prompt in PROMPTS.tolist()]
    assert model.retriever is None


@pytest.mark.parametrize("stride", [CHUNK, 2])
def test_retro_tokens_are_those_of_generate(model, stride):
    new = generate_retro(model, SparseRetriever(), PROMPTS, NEW, stride)
    model.set_retriever(SparseRetriever())
    settings = {"max_new_tokens": NEW, "do_sample": False, "retrieval_stride": stride, "pad_token_id": 0}
    expected = model.generate(PROMPTS, attention_mask=torch.ones_like(PROMPTS), **settings)
    model.set_retriever(None)
    assert torch.equal(new, expected[:, -NEW:])
    for row, tokens in zip(PROMPTS, new, strict=True):
        drafted = generate_retro(model, SparseRetriever(), row[None], NEW, stride, drafts=True)
        assert torch.equal(drafted[0], tokens)


@pytest.mark.parametrize("stride", [CHUNK, 3])
@pytest.mark.parametrize("weight", [0.9, 0.3])
def test_copying_tokens_equal_a_slow_loop(stride, weight):
    decoder = small_decoder("llama")

    def distribution(text, found, searched, read):
        alone = next_probabilities(decoder, text)
        texts = [ids[mask].tolist() for ids, mask in zip(found.ids[0], found.attention_mask[0], strict=True)]
        for length in (2, 1):
            follow = [t[i] for t in texts for i in range(length, len(t)) if t[i - length : i] == text[-length:]]
            if follow:
                copied = torch.bincount(torch.tensor(follow), minlength=len(alone)) / len(follow)
                hits.append(length)
                return (1 - weight) * alone + weight * copied
        return alone

    hits: list[int] = []
    new = generate_copying(decoder, EchoRetriever(), weight, PROMPTS, NEW, stride)
    rows = PROMPTS.tolist()
    assert new.tolist() == [written_by_hand(prompt, stride, distribution, EchoRetriever) for prompt in rows]
    assert {1, 2} & {*hits}
