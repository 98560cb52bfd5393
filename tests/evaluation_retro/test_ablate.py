"""`retro-eval ablate` measures each variant as the model does with these neighbors alone."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evaluation_retro.ablate import AblateSettings
from evaluation_retro.cli import main
from evaluation_retro.windows import TextSettings, draw_windows
from retrieval import BulkTokenizer, Embedder, MilvusRetriever, MilvusStore, ingest, read_documents
from retrieval.rows import doc_key

from ..support.evaluated import place_of
from ..support.training_world import CHUNK
from .test_leakage import flags

WINDOW = 3 * CHUNK + 1


def run(folder, world, model, *flags_, **changes):
    settings = {"model": model, "texts": world / "held_out", "window": WINDOW, "output_dir": folder, **place_of(world)}
    main(["ablate", *flags(settings | changes), *flags_])
    return json.loads((folder / "ablations.json").read_text())["ablations"]


@torch.no_grad()
def slow_bits(opened, world, k=2, stride=CHUNK, store=None, continuation=True):
    """Return bits per byte and the decoder's, by forward passes of one window each."""
    settings = TextSettings(texts=[str(world / "held_out")], window=WINDOW)
    windows = draw_windows(settings.documents(), opened.tokenizer, settings)
    base = opened.retriever
    retriever = MilvusRetriever(store or base.store, base.tokenizer, base.embedder, num_neighbors=k)
    points, nats, text_bytes = range(CHUNK, WINDOW, stride), np.zeros(2), 0
    config = opened.model.config
    before, config.num_neighbors = config.num_neighbors, k
    for tokens, doc_id in zip(windows.tokens, windows.doc_ids, strict=True):
        queries = [tokens[point - CHUNK : point].tolist() for point in points]
        found = retriever.retrieve(queries, [[doc_id]] * len(queries))
        mask = found.attention_mask[None].clone()
        if not continuation:
            mask[..., CHUNK:] = False
        read = {
            "neighbor_ids": found.ids[None],
            "neighbor_attention_mask": mask,
            "neighbor_scores": found.scores[None].nan_to_num(0.0),
            "retrieval_stride": stride,
        }
        for place, arguments in enumerate((read, {"use_retrieval": False})):
            logits = opened.model(tokens[None], **arguments).logits[0, CHUNK - 1 : -1]
            nats[place] += F.cross_entropy(logits, tokens[CHUNK:], reduction="sum").item()
        text_bytes += len(opened.tokenizer.decode_bytes(tokens[CHUNK:].tolist()))
    config.num_neighbors = before
    return nats / math.log(2) / text_bytes


def check(line, expected):
    on, off = expected
    assert line["bits_per_byte"] == pytest.approx(on, abs=1e-4)
    assert line["over_decoder"]["value"] == pytest.approx(off - on, abs=1e-4)
    assert line["over_decoder"]["low"] <= line["over_decoder"]["value"] <= line["over_decoder"]["high"]


def test_every_variant_is_what_the_model_says_with_its_neighbors(world, copier, opened, tokenizer, tmp_path):
    lines = run(tmp_path / "report", world, copier, "--neighbors", "1", "2", "5")
    assert list(lines) == ["neighbors", "sizes", "stride", "continuation", "search"]
    for line, k in zip(lines["neighbors"], (1, 2, 5), strict=True):
        check(line, slow_bits(opened, world, k=k))
    for line, stride in zip(lines["stride"], (8, 4, 2, 1), strict=True):
        check(line, slow_bits(opened, world, stride=stride))
    for line, continuation in zip(lines["continuation"], (True, False), strict=True):
        check(line, slow_bits(opened, world, continuation=continuation))
    trained = slow_bits(opened, world)
    for name, choices in lines.items():
        assert sum(line["is_trained"] for line in choices) == 1, name
        for line in choices:
            paired = trained[0] - line["bits_per_byte"]
            assert line["over_trained"]["value"] == pytest.approx(paired, abs=1e-4)
    assert len({line["bits_per_byte"] for line in lines["neighbors"] + lines["stride"]}) == 6
    # the half of the documents as a knowledge base of its own
    half = next(line for line in lines["sizes"] if line["label"].startswith("1/2 "))
    documents = sorted(read_documents(str(world / "train")), key=lambda document: doc_key(document.id))
    store = MilvusStore(str(tmp_path / "half.db"), "texts")
    bulk, embedder = BulkTokenizer(tokenizer), Embedder(str(world / "embedding"), device="cpu")
    for document in documents:
        ingest([document], store, bulk, embedder, chunk_size=CHUNK)
        if store.count() >= opened.retriever.store.count() / 2:
            break
    assert half["label"] == f"1/2 ({store.count():,} chunks)"
    check(half, slow_bits(opened, world, store=store))
    store.close()
    text = (tmp_path / "report" / "ablations.md").read_text()
    assert "cannot be searched by bm25 or hybrid" in text


def test_a_hybrid_collection_is_searched_all_three_ways(world, copier, tokenizer, tmp_path):
    store = MilvusStore(str(tmp_path / "hybrid.db"), "texts")
    bulk, embedder = BulkTokenizer(tokenizer), Embedder(str(world / "embedding"), device="cpu")
    texts = read_documents(str(world / "train"))
    ingest(texts, store, bulk, embedder, chunk_size=CHUNK, search="hybrid")
    store.close()
    some = ("--only", "search", "sizes", "--sizes", "0.5", "1")
    lines = run(tmp_path / "report", world, copier, *some, knowledge_base=tmp_path / "hybrid.db")
    assert list(lines) == ["search", "sizes"]
    assert [line["label"] for line in lines["search"]] == ["dense", "bm25", "hybrid"]
    assert [line["is_trained"] for line in lines["search"]] == [False, False, True]
    assert len({line["bits_per_byte"] for line in lines["search"]}) > 1
    assert len(lines["sizes"]) == 2


def test_a_second_run_measures_nothing_again(world, copier, tmp_path, monkeypatch):
    first = run(tmp_path, world, copier)
    monkeypatch.setattr(MilvusRetriever, "retrieve", None)
    monkeypatch.setattr("evaluation_retro.measuring.WindowNats._reading", None)
    assert run(tmp_path, world, copier) == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": "neighbours"}, "neighbours"),
        ({"strides": 16}, "the model's chunks have 8 tokens"),
        ({"sizes": 2}, "Give shares above 0, up to 1"),
        ({"neighbors": 0}, "neighbors is 0"),
        ({"window": CHUNK}, "Set --window to 9 or more"),
        ({"knowledge_base": "nowhere.db"}, "nowhere.db"),
    ],
)
def test_bad_settings_end_with_a_sentence(changes, message, world, copier, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, world, copier, **changes)
    assert message in str(ended.value) + capsys.readouterr().err


def test_settings_of_a_file_may_be_single(tmp_path):
    settings = AblateSettings(model="m", only="stride", strides=4)
    assert settings.only == ["stride"] and settings.strides == [4]
