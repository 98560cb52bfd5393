"""Generation with other decoders and a retriever is generation by hand, in every mode."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, pipeline

from modeling_retro.library import CACHE

from ..support.by_hand import PROMPTS, Grid, HashRetriever, greedy_by_hand, left_padded
from ..support.decoders import COPYING, open_decoder, retrieving_retro
from ..support.retro_models import CHUNK, VOCAB
from ..support.small_models import letter_tokenizer
from .test_generation import beam_search_by_hand

STEPS = 2 * CHUNK + 1
GREEDY = {"max_new_tokens": STEPS, "do_sample": False}
PROMPT = PROMPTS[2]
TWO = ["gemma3", "gpt_neox"]  # with sliding windows, and with parallel layers


@pytest.fixture
def model(family, saved_decoder):
    return retrieving_retro(saved_decoder(family))


def assert_by_hand(model, sequences, prompts=PROMPTS, stride=CHUNK):
    for prompt, row in zip(prompts, sequences.tolist(), strict=True):
        expected = greedy_by_hand(model, prompt, STEPS, Grid.aligned_to(prompt, stride))
        assert row[-STEPS - len(prompt) :] == expected


def test_greedy_search_on_a_left_padded_batch_is_greedy_search_by_hand(model):
    output = model.generate(**left_padded(PROMPTS), **GREEDY, return_dict_in_generate=True)
    assert_by_hand(model, output.sequences)
    searched = [query for call in model.retriever.calls for query in call]
    assert len(searched) == len(set(searched))
    for prompt, row, read in zip(PROMPTS, output.sequences.tolist(), output.retrieved, strict=True):
        text = row[-STEPS - len(prompt) : -1]
        assert [chunk.end for chunk in read] == Grid.aligned_to(prompt).points(text)
        queries = Grid.aligned_to(prompt).queries(text)
        assert [chunk.doc_ids for chunk in read] == HashRetriever().retrieve(queries).doc_ids


@pytest.mark.parametrize("family", TWO, indirect=True)
@pytest.mark.parametrize(
    "mode",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 5},
        {"retrieval_stride": 3},
    ],
    ids=str,
)
def test_every_mode_writes_the_same_text(model, mode):
    sequences = model.generate(**left_padded(PROMPTS), **GREEDY, **mode)
    assert_by_hand(model, sequences, stride=mode.get("retrieval_stride", CHUNK))


def test_copy_head_alone_writes_as_by_hand(saved_decoder):
    model = retrieving_retro(saved_decoder("opt"), **COPYING, cca_match=False)
    assert_by_hand(model, model.generate(**left_padded(PROMPTS), **GREEDY))


@pytest.mark.parametrize("family", TWO, indirect=True)
def test_beam_search_is_beam_search_by_hand(model):
    sequences = model.generate(**left_padded(PROMPTS), **GREEDY, num_beams=3)
    for prompt, row in zip(PROMPTS, sequences.tolist(), strict=True):
        assert row[-STEPS - len(prompt) :] == beam_search_by_hand(model, prompt, STEPS, 3)


@pytest.mark.parametrize("family", TWO, indirect=True)
@pytest.mark.parametrize("draft", ["prompt lookup", "neighbors", "decoder"])
def test_drafted_tokens_change_nothing_in_the_text(model, saved_decoder, draft):
    prompt = PROMPT[:5] * 3
    # some versions of transformers cannot draft with the sliding windows of Gemma 3
    decoder = open_decoder(saved_decoder("llama"))
    drafts = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "neighbors": {"draft_from_neighbors": True},
        "decoder": {"assistant_model": decoder},
    }[draft]
    assert_by_hand(model, model.generate(torch.tensor([prompt]), **drafts, **GREEDY), [prompt])


@pytest.mark.parametrize("family", TWO, indirect=True)
def test_generation_goes_on_from_a_returned_cache(model):
    prompt = torch.tensor([PROMPTS[0]])
    whole = model.generate(prompt, max_new_tokens=14, do_sample=False)
    part = model.generate(prompt, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    settings = {CACHE: part[CACHE], "max_new_tokens": 8, "do_sample": False, "align_to_prompt": False}
    assert torch.equal(model.generate(part.sequences, **settings), whole)


@pytest.mark.parametrize("family", TWO, indirect=True)
def test_the_prompt_may_be_given_as_embeddings(model):
    embeds = model.get_input_embeddings()(torch.tensor([PROMPT]))
    assert_by_hand(model, model.generate(torch.tensor([PROMPT]), inputs_embeds=embeds, **GREEDY), [PROMPT])
    alone = model.generate(inputs_embeds=embeds, **GREEDY)  # its tokens cannot be searched for
    assert torch.equal(alone, model.generate(inputs_embeds=embeds, use_cache=False, **GREEDY))


@pytest.mark.parametrize("family", ["gemma3"], indirect=True)  # which takes a mask for each kind of layer
def test_generation_compiles_without_a_graph_break(model):
    torch.compiler.reset()
    counters.clear()
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True  # otherwise the library compiles on GPUs only
    settings = {"cache_implementation": "static", "compile_config": compiled}
    written = model.generate(torch.tensor([PROMPT]), **settings, max_new_tokens=CHUNK + 1, do_sample=False)
    assert written[0].tolist() == greedy_by_hand(model, PROMPT, CHUNK + 1)
    assert counters["stats"]["unique_graphs"] > 0


TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"


@pytest.mark.parametrize("family", ["llama", "gemma3"], indirect=True)
def test_a_pipeline_answers_chat_messages(model):
    tokenizer = letter_tokenizer(VOCAB)
    tokenizer.chat_template = TEMPLATE
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    messages = [{"role": "system", "content": "hij"}, {"role": "user", "content": "klmno"}]
    (answer,) = generator(messages, **GREEDY)
    prompt = tokenizer.encode("hijklmnoa", add_special_tokens=False)
    written = tokenizer.decode(greedy_by_hand(model, prompt, STEPS)[len(prompt) :], skip_special_tokens=True)
    assert answer["generated_text"] == [*messages, {"role": "assistant", "content": written}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert_by_hand(model, model.generate(**encoded, **GREEDY), [prompt])
