"""kNN-LM equals brute force: keys computed one by one, all distances, votes summed by token."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from evaluation_retro.key_building import KeySettings, build_keys, key_windows, knowledge_texts
from evaluation_retro.knn_lm import COUNTS, WEIGHTS, KeysFound, KnnSettings, choose_knn, find_keys
from retrieval import BulkTokenizer, Document, KnowledgeBaseError, MilvusStore, ingest

from ..support.decoders import small_decoder
from ..support.rivals import VOCABULARY, plain_decoder

WINDOW, CONTEXT = 12, 4


@pytest.fixture(scope="module")
def decoder():
    return plain_decoder()


@pytest.fixture(scope="module")
def documents():
    """Seven documents of 1 to 40 tokens."""
    generator = torch.Generator().manual_seed(3)
    lengths = (40, 1, 12, 13, 30, 2, 25)
    return [(f"doc {n}", torch.randint(VOCABULARY, (n,), generator=generator).tolist()) for n in lengths]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys.db"
    return KeySettings(str(file), max_keys=1000, key_window=WINDOW, key_context=CONTEXT)


@pytest.fixture(scope="module")
def keys(decoder, documents, settings):
    store = build_keys(decoder, documents, settings)
    yield store
    store.close()


@torch.no_grad()
def slow_state(decoder, tokens):
    """Return the last hidden state at the end of some tokens."""
    return decoder(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0, -1].double()


@pytest.fixture(scope="module")
def made(decoder, documents):
    """All keys by definition: (document, state, next token)."""
    made = []
    for doc_id, tokens in documents:
        for i in range(len(tokens) - 1):
            new = WINDOW - CONTEXT  # tokens of each further window that were not in the one before
            begin = 0 if i < WINDOW else (1 + (i - WINDOW) // new) * new
            made.append((doc_id, slow_state(decoder, tokens[begin : i + 1]), tokens[i + 1]))
    return made


@torch.no_grad()
def slow_nats(decoder, made, tokens, own, knn):
    """Return the nats of a text's tokens under the mixture, by all distances and votes."""
    nats = []
    others = [(key, token) for doc, key, token in made if doc not in own]
    for i in range(len(tokens) - 1):
        state = slow_state(decoder, tokens[: i + 1])
        distances = (torch.stack([key for key, _ in others]) - state).square().sum(1).tolist()
        near = sorted(zip(distances, [token for _, token in others], strict=True))
        votes = [(math.exp(-distance / knn.temperature), token) for distance, token in near[: knn.k]]
        total = sum(vote for vote, _ in votes)
        voted = sum(vote for vote, token in votes if token == tokens[i + 1]) / total
        alone = float(decoder(torch.tensor([tokens[: i + 1]])).logits[0, -1].double().softmax(-1)[tokens[i + 1]])
        nats.append(-math.log((1 - knn.weight) * alone + knn.weight * voted))
    return torch.tensor(nats)


@pytest.mark.parametrize("knn", [KnnSettings(1, 0.3, 5.0), KnnSettings(7, 0.6, 20.0)])
def test_nats_equal_brute_force(decoder, documents, keys, made, knn):
    assert keys.count() == len(made) == sum(len(tokens) - 1 for _, tokens in documents)
    texts = [documents[0][1][:12], documents[4][1][:12], documents[6][1][2:14]]
    own = [{"doc 40"}, set(), {"doc 25", "doc 30"}]
    found = find_keys(decoder, keys, torch.tensor(texts), own, k=9)
    expected = torch.stack([slow_nats(decoder, made, *text, knn) for text in zip(texts, own, strict=True)])
    torch.testing.assert_close(found.mixed(knn), expected, atol=1e-3, rtol=1e-3)
    assert (found.distances.diff(dim=-1) >= 0).all()
    # a text's own keys are the nearest, unless its documents are excluded
    assert found.distances[1, :, 0].max() < 1e-3 < 1 < found.distances[0, :, 0].min()


def test_positions_before_the_first_one_are_not_predicted(decoder, documents, keys):
    texts = torch.tensor(
        [tokens[:20] for _, tokens in documents if len(tokens) >= 20] * 2
    )  # more than are read at once
    batches = []
    found = find_keys(decoder, keys, texts, k=4, first=6, progress=lambda numbers: batches.extend(numbers) or numbers)
    whole = find_keys(decoder, keys, texts, k=4)
    knn = KnnSettings(4, 0.5, 10.0)
    assert found.mixed(knn)[:, :6].isnan().all()
    torch.testing.assert_close(found.mixed(knn)[:, 6:], whole.mixed(knn)[:, 6:], atol=1e-4, rtol=1e-4)
    assert batches == [0, 4]


def test_without_keys_the_decoder_stands_alone(decoder, documents, keys):
    text = torch.tensor([documents[0][1][:10]])
    found = find_keys(decoder, keys, text, [[doc_id for doc_id, _ in documents]], k=4)
    assert found.distances.isinf().all()
    assert torch.equal(found.mixed(KnnSettings(4, 0.5, 1.0)), found.nats)
    with pytest.raises(ValueError, match="No key was found for any training text"):
        choose_knn([found])
    with pytest.raises(ValueError, match="k is 5, but 4 keys were found"):
        found.mixed(KnnSettings(5, 0.5, 1.0))


def test_the_mixtures_distribution_adds_up_and_has_the_same_nats(decoder, documents, keys):
    text = torch.tensor([documents[4][1][:20]])
    found, knn = find_keys(decoder, keys, text, [{"doc 30"}], k=6), KnnSettings(5, 0.4, 15.0)
    with torch.no_grad():
        output = decoder(text, output_hidden_states=True)
    distances, tokens = keys.search(output.hidden_states[-1][0, :-1].numpy(), 6, [{"doc 30"}] * 19)
    mixed = knn.mixed(output.logits[0, :-1].log_softmax(-1), torch.from_numpy(distances), torch.from_numpy(tokens))
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(19))
    nats = -mixed.gather(1, text[0, 1:, None])[:, 0]
    torch.testing.assert_close(nats, found.mixed(knn)[0], atol=1e-4, rtol=1e-4)


def test_the_chosen_settings_have_the_fewest_nats_of_the_grid():
    generator = torch.Generator().manual_seed(5)
    parts = []
    for _ in range(2):
        distances = torch.rand(2, 9, 20, generator=generator).sort(-1).values * 40
        hits = torch.rand(2, 9, 20, generator=generator) < 0.4
        parts.append(KeysFound(torch.rand(2, 9, generator=generator) * 6, distances, hits))
    parts[0].nats[:, :3] = torch.nan
    chosen = choose_knn(parts)
    unit = float(torch.cat([part.distances[..., 0].flatten() for part in parts]).double().mean())

    def total(k, weight, temperature):
        sums = 0.0
        for part in parts:
            for nats, distances, hits in zip(
                part.nats.flatten(), part.distances.flatten(0, 1), part.hits.flatten(0, 1), strict=True
            ):
                votes = np.exp(-distances[:k].numpy() / temperature)
                voted = float((votes * hits[:k].numpy()).sum() / votes.sum())
                if not nats.isnan():
                    sums -= math.log((1 - weight) * math.exp(-nats) + weight * voted)
        return sums

    grid = {(k, w, t * unit): total(k, w, t * unit) for k in COUNTS[:2] for w in WEIGHTS for t in (0.03, 0.1, 0.3, 1.0)}
    best = min(grid, key=grid.__getitem__)
    assert (chosen.k, chosen.weight) == best[:2]
    assert chosen.temperature == pytest.approx(best[2])


def test_a_broken_run_is_continued(decoder, documents, settings, keys, tmp_path):
    again = replace(settings, key_store=str(tmp_path / "keys.db"))

    def breaks(numbers):
        yield from numbers[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_keys(decoder, documents, again, breaks)
    seen = []
    continued = build_keys(decoder, documents, again, lambda numbers: seen.extend(numbers) or numbers)
    queries = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).numpy()
    for ours, whole in zip(continued.search(queries, 8), keys.search(queries, 8), strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-5)
    assert continued.count() == keys.count()
    continued.close()
    seen.clear()
    build_keys(decoder, documents, again, lambda numbers: seen.extend(numbers) or numbers).close()
    assert not seen  # nothing is made twice


def test_finished_windows_are_not_read_again(decoder, documents, settings, monkeypatch, tmp_path):
    monkeypatch.setattr("evaluation_retro.key_building.ROWS_PER_CALL", 0)  # each call has written all of its rows
    again = replace(settings, key_store=str(tmp_path / "keys.db"))

    def breaks(numbers):
        yield from numbers[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_keys(decoder, documents, again, breaks)
    left = []
    build_keys(decoder, documents, again, lambda numbers: left.extend(numbers) or numbers).close()
    every = len(range(0, len(key_windows(documents, again)), 4))
    assert len(left) == every - 2


def test_keys_of_something_else_are_refused(decoder, documents, settings, keys):
    others = {
        "decoder": (small_decoder("llama"), documents, settings),
        "texts": (decoder, [("other", documents[0][1]), *documents[1:]], settings),
        "window": (decoder, documents, replace(settings, key_context=3)),
        "number of keys": (decoder, documents, replace(settings, max_keys=50)),
        "index": (decoder, documents, replace(settings, key_index="HNSW")),
    }
    for name, given in others.items():
        with pytest.raises(KnowledgeBaseError, match=f"has keys of another {name}.*Name another file or collection"):
            build_keys(*given)
    assert find_keys(decoder, keys, torch.tensor([documents[0][1][:5]]), k=2).distances.isfinite().all()


def test_bad_settings_are_refused_early(decoder, documents, tmp_path):
    with pytest.raises(ValueError, match="key_context is 12 and key_window 12"):
        KeySettings(key_window=12, key_context=12)
    with pytest.raises(ValueError, match="max_keys is 0"):
        KeySettings(max_keys=0)
    file = tmp_path / "keys.db"
    with pytest.raises(ValueError, match="key_window is 4096, but the decoder has 2048 positions"):
        build_keys(decoder, documents, KeySettings(str(file), key_window=4096))
    with pytest.raises(ValueError, match="The 1 texts make no keys"):
        build_keys(decoder, documents[1:2], KeySettings(str(file)))
    assert not file.exists()
    with pytest.raises(ValueError, match="There is no index 'TREE'"):
        build_keys(decoder, documents, KeySettings(str(file), key_index="TREE"))


def test_at_most_max_keys_are_made_and_their_bytes_are_reported(decoder, documents, tmp_path):
    file = tmp_path / "keys.db"
    store = build_keys(decoder, documents, KeySettings(str(file), max_keys=45, key_window=WINDOW, key_context=CONTEXT))
    assert store.count() == 45
    assert store.num_bytes() == sum(path.stat().st_size for path in [file, *file.rglob("*")] if path.is_file())
    assert store.num_bytes() > 45 * 4 * 32
    store.close()


def test_texts_are_drawn_from_the_knowledge_base(tokenizer, tmp_path):
    texts = [Document(f"doc {n}", f"{'The retriever found a passage. ' * n}Number {n}.") for n in range(1, 9)]
    store = MilvusStore(str(tmp_path / "kb.db"), "texts")
    bulk = BulkTokenizer(tokenizer)
    ingest(texts, store, bulk, None, chunk_size=8, search="bm25")
    tokens = dict(zip([text.id for text in texts], bulk.encode_batch([text.text for text in texts]), strict=True))
    whole = knowledge_texts(store, 10_000)
    assert dict(whole) == tokens and [doc_id for doc_id, _ in whole] != sorted(tokens)
    assert knowledge_texts(store, 10_000) == whole
    assert knowledge_texts(store, 10_000, seed=1) != whole
    some = knowledge_texts(store, 60)
    assert some == whole[: len(some)]
    counts = [len(tokens) - 1 for _, tokens in some]
    assert sum(counts[:-1]) < 60 <= sum(counts)
    store.close()
