"""The keys of kNN-LM, which lie beside a knowledge base, on Milvus Lite and on a server."""

import numpy as np
import pytest
from pymilvus import DataType, MilvusClient

from evaluation_retro.key_store import KeyStore
from retrieval import KnowledgeBaseError

DIMENSION, KEYS = 24, 700
IDENTITY = {"decoder": "one", "texts": "some"}


@pytest.fixture
def store(place):
    store = KeyStore(place.uri, place.name)
    store.open(IDENTITY, DIMENSION, "FLAT")
    yield store
    store.connection.drop_collection(place.name)
    store.close()


@pytest.fixture
def keys(store):
    """Keys of ten documents, some written twice, as after a broken run."""
    draw = np.random.default_rng(0)
    states = draw.normal(3.0, 2.0, (KEYS, DIMENSION)).astype(np.float32)
    tokens = draw.permutation(KEYS).tolist()  # so that a token tells which key was found
    doc_ids = [f"doc {number % 10}" for number in range(KEYS)]
    for start in (0, 350, 300, 650):
        part = slice(start, start + 350)
        store.write(start, states[part], tokens[part], doc_ids[part])
    store.flush()
    return states, tokens, doc_ids


def test_a_search_finds_what_brute_force_finds(place, store, keys):
    states, tokens, doc_ids = keys
    queries = np.random.default_rng(1).normal(3.0, 2.0, (6, DIMENSION)).astype(np.float32)
    excluded = [set(), {"doc 1"}, {"doc 1"}, {"doc 2", "doc 3", "not there"}, set(), set(doc_ids) - {"doc 4"}]
    assert store.count() == KEYS
    distances, found = store.search(queries, 80, excluded)
    for row, (query, own) in enumerate(zip(queries, excluded, strict=True)):
        others = [number for number, doc_id in enumerate(doc_ids) if doc_id not in own]
        exact = np.square(states.astype(np.float64) - query).sum(1)
        nearest = np.sort(exact[others])[:80]
        np.testing.assert_allclose(distances[row, : len(nearest)], nearest, rtol=1e-4, atol=1e-3)
        assert np.isinf(distances[row, len(nearest) :]).all()
        numbers = [tokens.index(token) for token in found[row, : len(nearest)]]
        assert len(set(numbers)) == len(nearest) and set(numbers) <= set(others)
        np.testing.assert_allclose(exact[numbers], nearest, rtol=1e-4, atol=1e-3)
    assert np.isinf(distances[5]).sum() == 10  # one document has 70 keys
    assert store.num_bytes() > KEYS * 4 * DIMENSION


def test_a_store_says_what_its_keys_are_made_of(place, store, keys):
    again = KeyStore(place.uri, place.name)
    again.open(IDENTITY, DIMENSION, "FLAT")
    assert again.count() == KEYS
    with pytest.raises(
        KnowledgeBaseError, match=f"collection '{place.name}' at .* has keys of another decoder and texts"
    ):
        again.open({"decoder": "two", "texts": "others"}, DIMENSION, "FLAT")
    again.close()


def test_another_programs_collection_is_refused(place):
    owner = place.store()
    with pytest.raises(ValueError, match="is not a collection's name"):
        KeyStore(place.uri, "no name")
    schema = MilvusClient.create_schema(auto_id=False)
    schema.add_field("pk", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=4)
    owner.connection.create_collection(place.name, schema, {})
    store = KeyStore(place.uri, place.name)
    with pytest.raises(KnowledgeBaseError, match="is no store of keys. Name another collection."):
        store.open(IDENTITY, DIMENSION, "FLAT")
    store.close()
