"""All ways of generating that transformers has, against generation by hand or without a cache."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import (
    CompileConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
)

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
from ..support.retro_models import CHUNK, VOCAB, random_tokens, small_config

STEPS = 3 * CHUNK + 2
PROMPT = PROMPTS[2]
GREEDY = {"max_new_tokens": STEPS, "do_sample": False}


@pytest.fixture
def model():
    return retrieving_model()


@pytest.fixture
def prompt():
    return torch.tensor([PROMPT])


def small_gpt2():
    torch.manual_seed(1)
    settings = {key: value for key, value in small_config().to_dict().items() if key in GPT2Config().to_dict()}
    gpt2 = GPT2LMHeadModel(GPT2Config(**settings | {"model_type": "gpt2", "n_layer": 2})).eval()
    gpt2.generation_config.pad_token_id = VOCAB - 1
    return gpt2


def nearly(model):
    """Return a model with slightly other weights, whose drafts are accepted in part."""
    torch.manual_seed(2)
    other = retrieving_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return other


@pytest.mark.parametrize("assistant", ["gpt2", "retro", "itself"])
def test_an_assistant_changes_nothing_in_the_text(model, prompt, assistant):
    assistant = {"gpt2": small_gpt2(), "retro": nearly(model), "itself": model}[assistant]
    sequences = model.generate(prompt, assistant_model=assistant, **GREEDY)
    assert sequences[0].tolist() == greedy_by_hand(model, PROMPT, STEPS)


def test_retro_assists_gpt2(model, prompt):
    gpt2 = small_gpt2()
    assert torch.equal(gpt2.generate(prompt, assistant_model=model, **GREEDY), gpt2.generate(prompt, **GREEDY))


def test_prompt_lookup_changes_nothing_in_the_text(model):
    repeated = PROMPT[:5] * 3
    sequences = model.generate(torch.tensor([repeated]), prompt_lookup_num_tokens=3, **GREEDY)
    assert sequences[0].tolist() == greedy_by_hand(model, repeated, STEPS)


def test_a_rejected_draft_leaves_nothing_behind(model, prompt):
    output = model.generate(prompt, assistant_model=small_gpt2(), return_dict_in_generate=True, **GREEDY)
    more = model.generate(output.sequences, cache=output[CACHE], max_new_tokens=5, do_sample=False)
    row = output.sequences[0].tolist()
    grid = Grid(Grid.aligned_to(PROMPT).first, ends=(len(row),))
    assert more[0].tolist() == greedy_by_hand(model, row, 5, grid)
    queries = [row[read.start : read.end] for read in output.retrieved[0]]
    assert [read.doc_ids for read in output.retrieved[0]] == HashRetriever().retrieve(queries).doc_ids


@pytest.mark.parametrize(
    "mode",
    [
        {"prefill_chunk_size": 5},
        {"prompt_lookup_num_tokens": 3},
        {"draft_from_neighbors": True},
        {"assistant": True},
        {"num_beams": 1},
    ],
)
def test_neighbors_given_for_the_prompt_work_in_every_mode(model, prompt, mode):
    found = HashRetriever().retrieve(prompt.view(-1, CHUNK))
    given = {"neighbor_ids": found.ids[None], "neighbor_attention_mask": found.attention_mask[None]}
    if mode.pop("assistant", False):
        mode["assistant_model"] = small_gpt2()
    expected = model.generate(prompt, use_cache=False, **GREEDY, **given)
    assert torch.equal(model.generate(prompt, **mode, **GREEDY, **given), expected)
    assert model.retriever.calls == []


@pytest.mark.parametrize("by_name", [True, False])
def test_a_given_configuration_says_where_the_log_ends(model, by_name):
    prompts = [PROMPTS[0], PROMPTS[2]]
    first, second = (greedy_by_hand(model, prompt, STEPS) for prompt in prompts)
    eos = first[len(prompts[0]) + 1]
    assert eos not in second[len(prompts[1]) :], "the other row goes on, and this one is filled up"
    end = first.index(eos, len(prompts[0])) + 1
    config = GenerationConfig(**GREEDY, eos_token_id=eos, pad_token_id=VOCAB - 1, return_dict_in_generate=True)
    batch = left_padded(prompts)
    ids = batch.pop("input_ids")
    output = model.generate(ids, generation_config=config, **batch) if by_name else model.generate(ids, config, **batch)
    assert [chunk.end for chunk in output.retrieved[0]] == Grid.aligned_to(prompts[0]).points(first[:end])


def test_a_prompt_prefilled_in_pieces_retrieves_the_same(model):
    batch = left_padded(PROMPTS)
    whole = model.generate(**batch, return_dict_in_generate=True, **GREEDY)
    pieces = model.generate(**batch, prefill_chunk_size=5, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(pieces.sequences, whole.sequences)
    assert pieces.retrieved == whole.retrieved


def test_beam_sampling_with_a_cache_is_beam_sampling_without(model):
    sampled = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        output = model.generate(
            **left_padded(PROMPTS),
            max_new_tokens=STEPS,
            num_beams=3,
            num_return_sequences=2,
            do_sample=True,
            use_cache=use_cache,
            return_dict_in_generate=True,
        )
        sampled.append((output.sequences.tolist(), output.retrieved))
    assert sampled[0] == sampled[1]


class Forbid(LogitsProcessor):
    """A caller's own processor, which forbids some tokens."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.tokens] = -torch.inf
        return scores


def test_a_logits_processor_of_the_caller_is_applied(model, prompt):
    forbidden = greedy_by_hand(model, PROMPT, STEPS)[len(PROMPT) :]
    sequences = model.generate(prompt, logits_processor=LogitsProcessorList([Forbid(forbidden)]), **GREEDY)
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(STEPS):
            logits = next_token_logits(model, tokens, Grid.aligned_to(PROMPT))
            logits[forbidden] = -torch.inf
            tokens.append(int(logits.argmax()))
    assert sequences[0].tolist() == tokens


@pytest.mark.parametrize("num_beams", [1, 3])
def test_scores_states_and_attentions_of_every_pass(model, num_beams):
    batch = left_padded(PROMPTS)
    output = model.generate(
        **batch,
        num_beams=num_beams,
        output_scores=True,
        output_hidden_states=True,
        output_attentions=True,
        return_dict_in_generate=True,
        **GREEDY,
    )
    rows, columns = batch["input_ids"].shape[0] * num_beams, batch["input_ids"].shape[1]
    assert len(output.scores) == len(output.hidden_states) == len(output.attentions) == len(output.cross_attentions)
    for step, layers in enumerate(output.cross_attentions):
        assert len(layers) == len(model.config.cca_layers)
        for weights in layers:
            assert weights.shape[:3] == (rows, model.config.n_head, columns if step == 0 else 1)
            total = weights.sum(-1)  # 1, or 0 where there are no neighbors
            assert torch.all(torch.isclose(total, torch.ones(())) | (total == 0))
    assert output.hidden_states[0][-1].shape == (rows, columns, model.config.n_embd)


def test_the_prompt_may_be_given_as_embeddings(model, prompt):
    embeds = model.get_input_embeddings()(prompt)
    # tokens known only by their embeddings cannot be searched for; the generated ones can, once
    # they fill a query
    alone = model.generate(inputs_embeds=embeds, **GREEDY)
    assert torch.equal(alone, model.generate(inputs_embeds=embeds, use_cache=False, **GREEDY))
    assert all(query in Grid().queries(alone[0].tolist()) for call in model.retriever.calls for query in call)
    with_ids = model.generate(prompt, inputs_embeds=embeds, **GREEDY)
    assert with_ids[0].tolist() == greedy_by_hand(model, PROMPT, STEPS)


@pytest.mark.parametrize("use_retrieval", [True, False])
def test_a_static_cache_changes_nothing_in_the_text(model, use_retrieval):
    batch = left_padded(PROMPTS)
    expected = model.generate(**batch, use_cache=False, use_retrieval=use_retrieval, **GREEDY)
    for _ in range(2):  # the library keeps a static cache for the next call
        written = model.generate(**batch, cache_implementation="static", use_retrieval=use_retrieval, **GREEDY)
        assert torch.equal(written, expected)


def test_generation_compiles_without_a_graph_break_and_with_few_graphs(model, prompt):
    torch.compiler.reset()
    counters.clear()
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True  # otherwise the library compiles on GPUs only
    steps = 8 * CHUNK
    written = model.generate(
        prompt, cache_implementation="static", compile_config=compiled, max_new_tokens=steps, do_sample=False
    )
    assert written[0].tolist() == greedy_by_hand(model, PROMPT, steps)
    # steps with and without a new chunk, each first with fixed sizes, then with growing ones
    assert 0 < counters["stats"]["unique_graphs"] <= 6


@pytest.mark.parametrize(("use_retrieval", "mode"), [(True, "default"), (False, "reduce-overhead")])
def test_a_memory_that_grows_is_kept_out_of_cuda_graphs(model, monkeypatch, use_retrieval, mode):
    """Graphs are captured by the mode "reduce-overhead" alone, the library's default."""
    modes = []
    monkeypatch.setattr(torch, "compile", lambda call, **settings: modes.append(settings["mode"]) or call)
    model.config.use_retrieval = use_retrieval
    model.get_compiled_call(None)
    assert modes == [mode]


def test_a_cache_follows_rows_that_are_reordered_cropped_repeated_and_selected(model):
    rows = [random_tokens(3 * CHUNK + 1, seed) for seed in (1, 2)]
    more = random_tokens(CHUNK + 1, seed=3)
    cache = model(torch.tensor(rows))[CACHE]
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-2)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 2]))
    logits = model(torch.tensor([more] * 3), cache=cache).logits[:, -1]
    for row, own in zip([rows[1], rows[0], rows[0]], logits, strict=True):
        torch.testing.assert_close(own, next_token_logits(model, row[:-2] + more, Grid()), atol=1e-5, rtol=1e-5)


def test_continuous_batching_is_refused(model):
    with pytest.raises(NotImplementedError, match="left-padded prompts"):
        model.generate_batch([PROMPT])
