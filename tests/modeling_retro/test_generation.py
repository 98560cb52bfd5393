"""Generation with a retriever: equal with and without a cache, one search a chunk, and a log."""

import logging

import pytest
import torch
from transformers import GPT2LMHeadModel, pipeline

from modeling_retro import RetroForCausalLM
from modeling_retro.library import CACHE

from ..support.by_hand import (
    PROMPTS,
    Grid,
    HashRetriever,
    greedy_by_hand,
    left_padded,
    next_token_logits,
    retrieving_model,
)
from ..support.retro_models import CHUNK, VOCAB, random_tokens, small_model
from ..support.small_models import letter_tokenizer


@pytest.fixture
def model():
    return retrieving_model()


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_search_on_a_left_padded_batch_is_greedy_search_by_hand(model, use_cache):
    steps = 3 * CHUNK
    batch = left_padded(PROMPTS)
    sequences = model.generate(**batch, max_new_tokens=steps, do_sample=False, use_cache=use_cache)
    for prompt, row in zip(PROMPTS, sequences.tolist(), strict=True):
        assert row[-steps - len(prompt) :] == greedy_by_hand(model, prompt, steps)


@pytest.mark.parametrize("use_cache", [True, False])
def test_each_chunk_is_searched_once_and_the_prompts_chunks_in_one_search(model, use_cache):
    batch = left_padded(PROMPTS)
    output = model.generate(
        **batch, max_new_tokens=2 * CHUNK + 1, do_sample=False, use_cache=use_cache, return_dict_in_generate=True
    )
    calls = model.retriever.calls
    assert set(calls[0]) == {query for prompt in PROMPTS for query in Grid.aligned_to(prompt).queries(prompt)}
    searched = [chunk for call in calls for chunk in call]
    assert len(searched) == len(set(searched))
    assert sum(map(len, output.retrieved)) >= len(set(searched))


def test_the_output_lists_the_documents_retrieved_for_each_chunk(model):
    batch = left_padded(PROMPTS)
    output = model.generate(**batch, max_new_tokens=2 * CHUNK, do_sample=False, return_dict_in_generate=True)
    for prompt, sequence, read in zip(PROMPTS, output.sequences.tolist(), output.retrieved, strict=True):
        row = sequence[len(sequence) - len(prompt) - 2 * CHUNK :]
        seen = len(row) - 1  # the last token was generated, but not run through the model
        assert [(chunk.chunk, chunk.end) for chunk in read] == [*enumerate(Grid.aligned_to(prompt).points(row[:seen]))]
        found = HashRetriever().retrieve([row[chunk.start : chunk.end] for chunk in read])
        assert [chunk.doc_ids for chunk in read] == found.doc_ids
        assert [chunk.chunk_indices for chunk in read] == found.chunk_indices.tolist()
        assert [chunk.scores for chunk in read] == found.scores.tolist()


def test_the_list_of_retrieved_chunks_ends_where_the_text_ends(model):
    first = greedy_by_hand(model, PROMPTS[2], 2)[-1]
    output = model.generate(
        torch.tensor([PROMPTS[2]]),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=first,
        return_dict_in_generate=True,
    )
    assert [chunk.chunk for chunk in output.retrieved[0]] == [0, 1, 2]


def test_sampling_returns_several_rows_with_the_retrieved_chunks_of_each(model):
    torch.manual_seed(0)
    output = model.generate(
        **left_padded(PROMPTS[:2]),
        max_new_tokens=2 * CHUNK,
        do_sample=True,
        top_k=20,
        num_return_sequences=3,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert output.sequences.shape[0] == len(output.retrieved) == 6
    for number, sequence in enumerate(output.sequences.tolist()):
        prompt = PROMPTS[:2][number // 3]
        row = sequence[len(sequence) - len(prompt) - 2 * CHUNK :]
        grid = Grid.aligned_to(prompt)
        expected = next_token_logits(model, row[:-1], grid)
        torch.testing.assert_close(output.logits[-1][number], expected, atol=1e-4, rtol=1e-4)
        assert [chunk.end for chunk in output.retrieved[number]] == grid.points(row[:-1])


@torch.no_grad()
def beam_search_by_hand(model, prompt, steps, num_beams):
    beams, grid = [(0.0, list(prompt))], Grid.aligned_to(prompt)
    for _ in range(steps):
        grown = []
        for score, tokens in beams:
            log_probs = next_token_logits(model, tokens, grid).log_softmax(-1)
            best = log_probs.topk(num_beams)
            grown += [
                (score + value, [*tokens, token])
                for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        beams = sorted(grown, key=lambda beam: -beam[0])[:num_beams]
    return beams[0][1]


@pytest.mark.parametrize("use_cache", [True, False])
def test_beam_search_is_beam_search_by_hand(model, use_cache):
    steps = 2 * CHUNK + 1
    sequences = model.generate(
        **left_padded(PROMPTS), max_new_tokens=steps, num_beams=3, do_sample=False, use_cache=use_cache
    )
    for prompt, row in zip(PROMPTS, sequences.tolist(), strict=True):
        assert row[-steps - len(prompt) :] == beam_search_by_hand(model, prompt, steps, 3)


def test_without_retrieval_it_is_gpt2s_generation(model, tmp_path):
    prompt = torch.tensor([PROMPTS[0]])
    model.save_pretrained(tmp_path)
    gpt2 = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    expected = gpt2.generate(prompt, max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(prompt, max_new_tokens=10, do_sample=False, use_retrieval=False), expected)
    assert model.retriever.calls == []
    model.set_retriever(None)
    assert torch.equal(model.generate(prompt, max_new_tokens=10, do_sample=False), expected)


def test_given_neighbors_are_used_and_the_retriever_is_not_asked(model):
    prompt = torch.tensor([PROMPTS[2]])
    found = HashRetriever().retrieve(prompt.view(-1, CHUNK))
    given = {"neighbor_ids": found.ids[None], "neighbor_attention_mask": found.attention_mask[None]}
    with_cache = model.generate(prompt, max_new_tokens=9, do_sample=False, **given)
    without_cache = model.generate(prompt, max_new_tokens=9, do_sample=False, use_cache=False, **given)
    assert torch.equal(with_cache, without_cache)
    assert model.retriever.calls == []


def test_generation_continues_from_a_returned_cache(model):
    prompt = torch.tensor([PROMPTS[0]])
    whole = model.generate(prompt, max_new_tokens=14, do_sample=False)
    part = model.generate(prompt, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    again = model.generate(part.sequences, cache=part[CACHE], max_new_tokens=8, do_sample=False, align_to_prompt=False)
    assert torch.equal(again, whole)


def test_a_returned_cache_gets_a_point_at_the_end_of_the_new_prompt(model):
    part = model.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=CHUNK, do_sample=False, return_dict_in_generate=True
    )
    prompt = part.sequences[0].tolist() + random_tokens(CHUNK + 1, seed=9)
    again = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(torch.tensor([prompt]), cache=part[CACHE], **again)
    grid = Grid(Grid.aligned_to(PROMPTS[0]).first, ends=(len(prompt),))
    assert output.sequences[0].tolist() == greedy_by_hand(model, prompt, 8, grid)


def test_forward_fetches_neighbors_that_are_not_given(model):
    row = random_tokens(3 * CHUNK + 2, seed=11)
    logits = model(torch.tensor([row])).logits[0, -1]
    torch.testing.assert_close(logits, next_token_logits(model, row, Grid()))
    cache = model(torch.tensor([row[: CHUNK + 1]]))[CACHE]
    logits = model(torch.tensor([row[CHUNK + 1 :]]), cache=cache).logits[0, -1]
    torch.testing.assert_close(logits, next_token_logits(model, row, Grid()), atol=1e-5, rtol=1e-5)


def test_from_pretrained_takes_a_retriever_and_saves_none(model, tmp_path):
    model.save_pretrained(tmp_path)
    retriever = HashRetriever()
    loaded = RetroForCausalLM.from_pretrained(tmp_path, retriever=retriever)
    assert loaded.retriever is retriever
    assert not any("retriever" in file.read_text(errors="ignore") for file in tmp_path.glob("*.json"))


@pytest.fixture
def tokenizer():
    return letter_tokenizer(VOCAB)


def test_a_stop_string_ends_the_text(model, tokenizer):
    expected = greedy_by_hand(model, PROMPTS[2], 6)
    sequences = model.generate(
        torch.tensor([PROMPTS[2]]),
        max_new_tokens=20,
        do_sample=False,
        tokenizer=tokenizer,
        stop_strings=tokenizer.decode(expected[-2:]),
    )
    assert sequences[0].tolist() == expected


def test_pipeline_generates_with_neighbors(model, tokenizer):
    texts = tokenizer.batch_decode(PROMPTS)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    for batch_size in (1, 4):
        outputs = generator(texts, max_new_tokens=CHUNK + 1, do_sample=False, batch_size=batch_size)
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            expected = greedy_by_hand(model, prompt, CHUNK + 1)
            assert output[0]["generated_text"] == tokenizer.decode(expected)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("chunk_size", 8),
        ("num_neighbors", 3),
        ("neighbor_length", 7),
        ("vocab_size", 1000),
        ("embedding_model", "a/b"),
    ],
)
def test_a_knowledge_base_with_other_sizes_is_refused(attribute, value):
    model = small_model(embedding_model="test/hash")
    model.set_retriever(HashRetriever())
    retriever = HashRetriever()
    setattr(retriever, attribute, value)
    with pytest.raises(ValueError, match=str(value)) as error:
        model.set_retriever(retriever)
    assert str(getattr(model.config, attribute)) in str(error.value)


def test_another_search_than_in_training_is_said_in_one_line(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model, retriever = small_model(embedding_model="test/hash", search="dense"), HashRetriever()
    retriever.search = "dense"
    model.set_retriever(retriever)
    assert not caplog.records
    retriever.search, retriever.embedding_model = "bm25", None  # a knowledge base of words alone
    model.set_retriever(retriever)
    (record,) = caplog.records
    assert record.getMessage() == (
        "The model was trained with neighbors found by dense search; these are found by bm25 search."
    )
