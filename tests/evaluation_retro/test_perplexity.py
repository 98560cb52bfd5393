"""`retro-eval perplexity` says of each token what a plain model says, and resumes."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from evaluation_retro import perplexity
from evaluation_retro.cli import INTERRUPTED, main
from evaluation_retro.kept import Kept
from evaluation_retro.opening import Opened, plain_decoder
from evaluation_retro.perplexity import PerplexitySettings, measure, overlapping_windows
from modeling_retro import RetroForCausalLM
from retrieval import BulkTokenizer, Document, Embedder, MilvusRetriever, MilvusStore, ingest, read_documents

from ..support.evaluated import place_of
from ..support.training_world import CHUNK

WINDOW, STRIDE = 40, 24


def flags(settings):
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def run(folder, world, model, **changes):
    settings = {
        "model": model,
        "texts": world / "held_out",
        "window": WINDOW,
        "window_stride": STRIDE,
        "output_dir": folder,
        **place_of(world),
    }
    main(["perplexity", *flags({name: value for name, value in (settings | changes).items() if value is not None})])
    return json.loads((folder / "perplexity.json").read_text())


def slow_nats(tokens, log_probs_of):
    """Return the nats of all tokens but the first, each in the window that shows most before it."""
    nats = []
    for place in range(1, len(tokens)):
        start = max(0, math.ceil((place + 1 - WINDOW) / STRIDE) * STRIDE)
        nats.append(-log_probs_of(tokens[start:place])[tokens[place]])
    return nats


@torch.no_grad()
def test_off_is_what_transformers_model_says_of_every_token(world, copier, tokenizer, tmp_path):
    plain_decoder(RetroForCausalLM.from_pretrained(copier)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    alone = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2").eval()
    of_plain = {"knowledge_base": None, "collection_name": None, "embedding_model": None}
    reports = [
        run(tmp_path / "retro", world, copier, documents=2),
        run(tmp_path / "plain", world, tmp_path / "gpt2", documents=2, **of_plain),
    ]
    nats, text_bytes = [], 0
    bulk = BulkTokenizer(tokenizer)
    for file in sorted((world / "held_out").iterdir())[:2]:
        (tokens,) = bulk.encode_batch([file.read_text()])
        nats += slow_nats(tokens, lambda before: alone(torch.tensor([before])).logits[0, -1].log_softmax(-1).tolist())
        text_bytes += len(bulk.decode_bytes(tokens[1:]))
    for report in reports:
        off = report["conditions"]["off"]
        assert report["tokens"] == len(nats) and report["bytes"] == text_bytes
        assert off["loss"] == pytest.approx(np.mean(nats), abs=1e-4)
        assert off["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
        assert off["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / text_bytes, abs=1e-4)
    assert list(reports[1]["conditions"]) == ["off"] and reports[1]["gain_over_off"] == {}


@torch.no_grad()
def test_on_reads_the_neighbors_of_each_windows_chunks(world, opened, retriever, tmp_path):
    texts = list(read_documents(str(world / "held_out")))[:2]
    documents = [Document(text.id, text.text[:150]) for text in texts]
    settings = PerplexitySettings(model="m", window=WINDOW, window_stride=STRIDE, **place_of(world))
    with_arithmetic = Opened(opened.model, opened.tokenizer, retriever)
    measured = measure(settings, with_arithmetic, documents, Kept(tmp_path, {}))

    def log_probs(before):
        # the last token before a point is the first to see its neighbors
        chunks = [before[point - CHUNK : point] for point in range(CHUNK, len(before) + 1, CHUNK)]
        given = {"use_retrieval": False}
        if chunks:
            found = retriever.retrieve(chunks)
            parts = (found.ids, found.attention_mask, found.scores)
            names = ("neighbor_ids", "neighbor_attention_mask", "neighbor_scores")
            given = dict(zip(names, (part[None] for part in parts), strict=True))
        return opened.model(torch.tensor([before]), **given).logits[0, -1].log_softmax(-1).tolist()

    for number, document in enumerate(documents):
        (tokens,) = opened.tokenizer.encode_batch([document.text])
        on = measured.nats[number, measured.conditions.index("on")]
        assert on == pytest.approx(sum(slow_nats(tokens, log_probs)), abs=1e-3)
    own = {doc_id for _, excluded in retriever.calls if excluded for ids in excluded for doc_id in ids}
    assert own == {document.id for document in documents}
    assert measured.of("shuffled")["loss"] != pytest.approx(measured.of("on")["loss"], abs=1e-5)


def test_a_second_knowledge_base_is_a_condition_of_its_own(world, opened, copier, tokenizer, tmp_path):
    store = MilvusStore(str(tmp_path / "other.db"), "texts")
    texts = read_documents(str(world / "held_out"))
    ingest(texts, store, BulkTokenizer(tokenizer), Embedder(str(world / "embedding"), device="cpu"), chunk_size=CHUNK)
    store.close()
    other = tmp_path / "other.db"
    report = run(tmp_path / "report", world, copier, second_knowledge_base=other, documents=2)
    assert set(report["conditions"]) == {"off", "on", "shuffled", "second knowledge base"}
    gains = report["gain_over_off"]
    difference = report["gain_of_on_over"]["second knowledge base"]["value"]
    assert difference == pytest.approx(gains["on"]["value"] - gains["second knowledge base"]["value"], abs=1e-9)

    store = MilvusStore.open(str(other), "texts")  # the same file, with one document less
    store.delete_documents([next(iter(read_documents(str(world / "held_out")))).id])
    store.close()
    with pytest.raises(SystemExit, match="second knowledge base was .* Name another folder"):
        run(tmp_path / "report", world, copier, second_knowledge_base=other, documents=2)


def test_no_window_is_shuffled_with_itself(world, opened, retriever, tmp_path, monkeypatch):
    rotated, shuffle = [], perplexity.shuffle_neighbors

    def counted(fields, seed):
        rotated.append(len(fields["neighbor_ids"]))
        return shuffle(fields, seed)

    monkeypatch.setattr(perplexity, "shuffle_neighbors", counted)
    text = next(iter(read_documents(str(world / "held_out")))).text
    settings = PerplexitySettings(model="m", window=16, window_stride=15, batch_size=2, **place_of(world))
    with_arithmetic = Opened(opened.model, opened.tokenizer, retriever)
    for count, name in ((9, "nine"), (1, "one")):
        tokens = opened.tokenizer.encode_batch([text])[0][: 15 * count + 1]
        documents = [Document("a", opened.tokenizer.decode(tokens))]
        measured = measure(settings, with_arithmetic, documents, Kept(tmp_path / name, {}))
        assert ("shuffled" in measured.conditions) == (count > 1)
    assert rotated and min(rotated) > 1


def test_every_token_is_predicted_once_however_windows_overlap():
    for length in range(2, 60):
        tokens = list(range(length))
        predicted = [
            token for window in overlapping_windows(0, tokens, 16, 5) for token in window.tokens[window.first :]
        ]
        assert predicted == tokens[1:]
        assert all(window.first >= 1 for window in overlapping_windows(0, tokens, 16, 5))


def test_a_run_that_was_interrupted_goes_on(world, copier, tmp_path, monkeypatch, capsys):
    expected = run(tmp_path / "whole", world, copier, batch_size=2)
    retrieve, calls = MilvusRetriever.retrieve, []

    def counted(self, chunks, **kwargs):
        calls.append(len(chunks))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return retrieve(self, chunks, **kwargs)

    monkeypatch.setattr(MilvusRetriever, "retrieve", counted)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "broken", world, copier, batch_size=2)
    assert ended.value.code == INTERRUPTED and "run the same command again" in capsys.readouterr().err
    parts = len(list((tmp_path / "broken" / "parts").glob("*.npz")))
    assert parts == 1  # of four batches
    assert run(tmp_path / "broken", world, copier, batch_size=2) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 500, "window_stride": 10}, "the model has 128 positions"),
        ({"window_stride": WINDOW}, "from 1 to below the window"),
        ({"batch_size": 1}, "Shuffled neighbors come from another window"),
        ({"texts": "nowhere"}, "'nowhere'"),
        ({"knowledge_base": None, "second_knowledge_base": "b.db"}, "knowledge_base is not"),
    ],
)
def test_bad_settings_end_with_a_sentence(changes, message, world, copier, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, world, copier, **changes)
    assert message in str(ended.value) + capsys.readouterr().err


def test_bad_input_leaves_the_folder_free(world, copier, tmp_path):
    with pytest.raises(SystemExit, match="the model has 128 positions"):
        run(tmp_path, world, copier, documents=2, window=500, window_stride=10)
    assert run(tmp_path, world, copier, documents=2)["documents"] == 2


def test_texts_without_any_neighbors_are_refused(world, copier, tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("Short.")
    with pytest.raises(SystemExit, match=f"neighbors are found for a chunk of {CHUNK}"):
        run(tmp_path / "short", world, copier, texts=tmp_path / "short.txt")
    store = MilvusStore(str(tmp_path / "own.db"), "texts")
    documents = read_documents(str(world / "held_out" / "0.txt"))
    embedder = Embedder(str(world / "embedding"), device="cpu")
    ingest(documents, store, BulkTokenizer(tokenizer), embedder, chunk_size=CHUNK)
    store.close()
    own = {"texts": world / "held_out" / "0.txt", "knowledge_base": tmp_path / "own.db"}
    with pytest.raises(SystemExit, match="No neighbors were found for any chunk"):
        run(tmp_path / "own", world, copier, **own)


def test_unknown_commands_and_settings_are_named(capsys):
    with pytest.raises(SystemExit, match="there is no command 'perplex'"):
        main(["perplex"])
    with pytest.raises(SystemExit):
        main(["perplexity", "--model", "m", "--windw", "3"])
    assert "did you mean window?" in capsys.readouterr().err
