"""A compiled model with a retriever: its graph ends before the search; results are the same."""

import pytest
import torch
from torch._dynamo.exc import Unsupported

from ..support.by_hand import Grid, greedy_by_hand, next_token_logits, retrieving_model
from ..support.retro_models import CHUNK, random_tokens

EAGER = {"atol": 1e-5, "rtol": 1e-5}
SMALL = {"n_layer": 1, "cca_layers": [0], "encoder_num_layers": 1, "copy_head": False, "cca_match": False}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("parts", [{}, {"copy_head": True, "cca_match": True}], ids=["cross_attention", "all"])
def test_a_compiled_model_searches_once_a_call_and_has_the_same_gradients(parts):
    model = retrieving_model(**(SMALL | parts), embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0).train()
    compiled = torch.compile(model, backend="aot_eager")
    for seed, length in ((1, 3 * CHUNK + 2), (2, CHUNK - 1)):
        ids = torch.tensor([random_tokens(length, seed)])
        gradients = []
        for computed in (model, compiled):
            model.retriever.calls.clear()
            model.zero_grad()
            loss = computed(input_ids=ids, labels=ids).loss
            loss.backward()
            assert len(model.retriever.calls) == (length >= CHUNK)
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(gradients[1], gradients[0], **EAGER)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own calls
@torch.no_grad()
@pytest.mark.parametrize("aligned", [True, False])
def test_generation_with_inductor_gives_the_same_text(aligned):
    model = retrieving_model(**SMALL)
    prompt = random_tokens(2 * CHUNK - 1, seed=1)
    # without alignment, the step after the prompt completes a chunk
    grid = Grid.aligned_to(prompt) if aligned else Grid()
    expected = greedy_by_hand(model, prompt, 2, grid)
    logits = [next_token_logits(model, expected[:end], grid) for end in range(len(prompt), len(expected))]
    model.forward = torch.compile(model.forward)  # as people speed up generate()
    settings = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(torch.tensor([prompt]), align_to_prompt=aligned, **settings)
    assert output.sequences[0].tolist() == expected
    torch.testing.assert_close(torch.cat(output.logits), torch.stack(logits), **EAGER)


def test_a_search_inside_one_graph_is_refused_with_a_remedy():
    with pytest.raises(Unsupported, match="neighbor_ids.*or compile without fullgraph=True"):
        torch.compile(retrieving_model(), fullgraph=True, backend="eager")(torch.tensor([random_tokens(CHUNK, seed=1)]))
