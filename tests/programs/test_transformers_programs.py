"""transformers' own programs: text-generation pipelines and streams."""

from threading import Thread

import pytest
import torch
from transformers import AutoModelForCausalLM, TextIteratorStreamer, TextStreamer, pipeline

from ..support.by_hand import PROMPTS, HashRetriever, greedy_by_hand, left_padded, retrieving_model
from ..support.retro_models import CHUNK, VOCAB

GREEDY = {"max_new_tokens": 2 * CHUNK + 1, "do_sample": False, "eos_token_id": None, "pad_token_id": VOCAB - 1}


@pytest.mark.parametrize("batch_size", [1, len(PROMPTS)])
def test_a_pipeline_is_built_from_a_path_and_a_retriever(saved, tokenizer, batch_size):
    retriever = HashRetriever()
    generator = pipeline("text-generation", model=saved, model_kwargs={"retriever": retriever})
    assert generator.model.retriever is retriever
    outputs = generator(tokenizer.batch_decode(PROMPTS), batch_size=batch_size, **GREEDY)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = greedy_by_hand(retrieving_model(), prompt, GREEDY["max_new_tokens"])
        assert output[0]["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert retriever.calls


def test_a_pipeline_from_a_path_alone_generates_without_neighbors(saved, tokenizer):
    generator = pipeline("text-generation", model=saved)
    text = tokenizer.decode(PROMPTS[0])
    expected = retrieving_model().generate(torch.tensor([PROMPTS[0]]), use_retrieval=False, **GREEDY)
    assert generator(text, **GREEDY)[0]["generated_text"] == tokenizer.decode(expected[0], skip_special_tokens=True)


def test_text_streams_while_it_reads(saved, tokenizer, capsys):
    model = AutoModelForCausalLM.from_pretrained(saved, retriever=HashRetriever())
    expected = tokenizer.decode(greedy_by_hand(model, PROMPTS[0], GREEDY["max_new_tokens"])[len(PROMPTS[0]) :])
    prompt = left_padded(PROMPTS[:1])

    model.generate(**prompt, **GREEDY, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == expected

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    writer = Thread(target=model.generate, kwargs={**prompt, **GREEDY, "streamer": streamer})
    writer.start()
    assert "".join(streamer) == expected
    writer.join()
    assert sum(map(len, model.retriever.calls)) == 2 * len({chunk for call in model.retriever.calls for chunk in call})
