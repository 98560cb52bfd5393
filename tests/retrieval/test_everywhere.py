"""Milvus Lite and a server behave alike; the truth is numpy over the same chunks."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from retrieval import (
    Document,
    Identity,
    IdentityMismatch,
    IndexSettings,
    KnowledgeBaseError,
    MilvusRetriever,
    NewCollection,
    chunk_documents,
    export_knowledge_base,
    import_knowledge_base,
    ingest,
)

from ..support.places import CHUNK, expected_rows, rows_of
from ..support.searched import longest_common_run
from ..support.small_models import train_tokenizer


def build(place, documents, tokenizer, embedder, **kwargs):
    store = place.store()
    ingest(documents, store, tokenizer, embedder, chunk_size=CHUNK, **kwargs)
    return store


def exact(queries, allowed, documents, tokenizer, embedder, k):
    """Return the scores of each query's k best chunks by brute force.

    Only chunks for which `allowed(query number, chunk)` is true count.
    """
    chunks = list(chunk_documents(documents, tokenizer, CHUNK))
    vectors = embedder.encode([tokenizer.decode(chunk.tokens) for chunk in chunks])
    found = []
    for number, query in enumerate(queries):
        scores = vectors @ embedder.encode([tokenizer.decode(list(query))])[0]
        scores = [score for score, chunk in zip(scores, chunks, strict=True) if allowed(number, chunk)]
        found.append(sorted(scores, reverse=True)[:k])
    return found


def same(found, expected):
    for number, scores in enumerate(expected):
        there = [doc_id for doc_id in found.doc_ids[number] if doc_id is not None]
        assert len(there) == len(scores), number
        np.testing.assert_allclose(found.scores[number, : len(scores)], scores, atol=1e-5)


def some_chunks(documents, tokenizer, count):
    whole = [c for c in chunk_documents(documents, tokenizer, CHUNK) if len(c.tokens) == CHUNK]
    return whole[:: max(1, len(whole) // count)][:count]


def test_every_chunk_is_there_once_with_what_follows_it(place, tokenizer, embedder, documents):
    store = place.store()
    report = ingest(documents, store, tokenizer, embedder, chunk_size=CHUNK)
    rows = expected_rows(documents, tokenizer)
    assert rows_of(store) == rows
    assert report.documents == len(documents) and report.chunks_written == store.count() == len(rows)
    again = ingest(documents, store, tokenizer, embedder, chunk_size=CHUNK)
    assert again.chunks_written == again.chunks_deleted == 0 and again.chunks_unchanged == len(rows)


def test_a_changed_document_leaves_no_stale_chunk(place, tokenizer, embedder, documents):
    first = [*documents, Document("empty", "")]
    report = ingest(first, store := place.store(), tokenizer, embedder, chunk_size=CHUNK)
    assert report.empty_documents == 1
    changed = [
        Document(documents[0].id, documents[0].text[:90]),
        Document(documents[1].id, ""),
        Document(documents[2].id, documents[2].text[:90] + " and something else"),
        *documents[3:],
        Document("empty", "a text"),
    ]
    report = ingest(changed, store, tokenizer, embedder, chunk_size=CHUNK)
    assert report.chunks_unchanged > 0 and report.chunks_deleted > 0
    assert rows_of(store) == expected_rows(changed, tokenizer) and store.count() == len(rows_of(store))


def test_exclusion_is_exact_among_hundreds_of_near_copies(place, tokenizer, embedder, documents):
    text = documents[0].text[:200]
    copies = [Document(f"near {i}", f"{text} v{i % 7}") for i in range(150)]
    everything = documents + copies
    store = build(place, everything, tokenizer, embedder)
    retriever = MilvusRetriever(store, tokenizer, embedder, num_neighbors=3)
    chunks = some_chunks(documents[:4], tokenizer, 20)
    near = {document.id for document in copies}
    ids = {document.id for document in everything}
    sets = [set(), {chunks[0].doc_id}, near, near | {"topic 0"}, ids - {"topic 5"}, ids, ids - {"near 3", "near 99"}]
    excluded = [sets[i % len(sets)] for i in range(len(chunks))]
    found = retriever.retrieve([c.tokens for c in chunks], exclude_doc_ids=excluded)
    for doc_ids, keys in zip(found.doc_ids, excluded, strict=True):
        assert not keys & set(doc_ids)
    queries = [c.tokens for c in chunks]
    same(found, exact(queries, lambda n, c: c.doc_id not in excluded[n], everything, tokenizer, embedder, 3))


def test_a_coarse_index_still_gives_k_neighbors(place, tokenizer, embedder, documents):
    """The index probes one list of many, and the filter leaves a handful of rows."""
    coarse = IndexSettings.parse("IVF_FLAT:nlist=64,nprobe=1")
    store = build(place, documents * 1, tokenizer, embedder, new=NewCollection(coarse))
    store.flush()
    retriever = MilvusRetriever(store, tokenizer, embedder, num_neighbors=4)
    chunks = some_chunks(documents, tokenizer, 10)
    keys = {document.id for document in documents} - {"topic 8", "copy 3 of 1"}
    found = retriever.retrieve([c.tokens for c in chunks], exclude_doc_ids=[keys] * len(chunks))
    queries = [c.tokens for c in chunks]
    same(found, exact(queries, lambda n, c: c.doc_id not in keys, documents, tokenizer, embedder, 4))


def test_without_exclusions_there_is_one_search(place, tokenizer, embedder, documents, monkeypatch):
    store = build(place, documents, tokenizer, embedder)
    retriever = MilvusRetriever(store, tokenizer, embedder)
    search, searches = store.connection.client.search, []
    monkeypatch.setattr(
        store.connection.client, "search", lambda *a, **k: searches.append(len(a[1])) or search(*a, **k)
    )
    chunk = some_chunks(documents, tokenizer, 1)[0].tokens
    retriever.retrieve([chunk, chunk, chunk, [5] * CHUNK])
    assert searches == [2]  # equal chunks are searched once


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_neighbors_that_share_a_long_run_are_left_out(place, tokenizer, embedder, documents, share):
    store = build(place, documents, tokenizer, embedder)
    retriever = MilvusRetriever(store, tokenizer, embedder, num_neighbors=3, max_leakage=share)
    chunks = some_chunks(documents[:5], tokenizer, 8)

    def allowed(number, chunk):
        text = (*chunks[number].tokens, *chunks[number].continuation)
        return longest_common_run(text, (*chunk.tokens, *chunk.continuation)) <= share * CHUNK

    queries = [c.tokens for c in chunks]
    found = retriever.retrieve(queries, continuations=[c.continuation for c in chunks])
    same(found, exact(queries, allowed, documents, tokenizer, embedder, 3))


METADATA = [
    {"source": "wiki", "year": 1999, "license": "mit", "date": "2023-12-31"},
    {"source": "web", "year": 2005, "checked": True, "date": "2024-01-01"},
    {"source": "wiki", "year": 2010.5, "checked": False},
    {"source": 'wiki" or year > 0', "year": -3},
    {},
]
FILTERS = [
    ({"source": "wiki"}, lambda m: m.get("source") == "wiki"),
    ({"source": ["web", "none"]}, lambda m: m.get("source") == "web"),
    ({"year": {">=": 2000, "<": 2010.5}}, lambda m: "year" in m and 2000 <= m["year"] < 2010.5),
    ({"year": 1999.0, "source": "wiki"}, lambda m: m.get("year") == 1999),
    ({"checked": True}, lambda m: m.get("checked") is True),
    ({"checked": 1}, lambda m: False),
    ({"date": {">=": "2024-01-01"}}, lambda m: m.get("date", "") >= "2024-01-01"),
    ({"source": 'wiki" or year > 0'}, lambda m: m.get("source") == 'wiki" or year > 0'),
    ({"nothing": "here"}, lambda m: False),
]


def test_filters_on_metadata_apply_to_searches_and_deletions(place, tokenizer, embedder, documents):
    tagged = [Document(d.id, d.text, METADATA[i % len(METADATA)]) for i, d in enumerate(documents)]
    metadata = {d.id: d.metadata for d in tagged}
    store = build(place, tagged, tokenizer, embedder)
    chunks = some_chunks(documents, tokenizer, 5)
    queries, keys = [c.tokens for c in chunks], {"topic 0", "topic 2", "topic 5"}
    for wanted, matches in FILTERS:
        retriever = MilvusRetriever(store, tokenizer, embedder, num_neighbors=3, filter=wanted)
        found = retriever.retrieve(queries, exclude_doc_ids=[keys] * len(queries))
        expected = exact(
            queries,
            lambda n, c, matches=matches: matches(metadata[c.doc_id]) and c.doc_id not in keys,
            documents,
            tokenizer,
            embedder,
            3,
        )
        same(found, expected)
    for wanted, matches in FILTERS[2:4]:
        before = rows_of(store)
        deleted = store.delete_documents(where=wanted)
        after = rows_of(store)
        assert after == [row for row in before if not matches(metadata[row[0]])]
        assert deleted == len(before) - len(after) > 0
    assert store.delete_documents(["topic 4", "unknown"]) > 0
    assert "topic 4" not in {row[0] for row in rows_of(store)}


def test_a_document_with_new_metadata_is_written_again(place, tokenizer, embedder):
    store = build(place, [Document("a", "the same text", {"year": 1})], tokenizer, embedder)
    report = ingest([Document("a", "the same text", {"year": 2})], store, tokenizer, embedder, chunk_size=CHUNK)
    assert report.chunks_written == 1 and store.count('metadata["year"] == 2') == store.count() == 1


def test_an_open_retriever_sees_additions_changes_and_deletions(place, tokenizer, embedder):
    store = build(place, [Document("old", "one two three four")], tokenizer, embedder)
    other = place.store()
    assert other.exists()
    retriever = MilvusRetriever(other, tokenizer, embedder, num_neighbors=1, cache_size=100)
    (query,) = tokenizer.encode_batch(["apples and pears"])
    assert retriever.retrieve([query]).doc_ids == [["old"]]

    ingest([Document("new", "apples and pears")], store, tokenizer, embedder, chunk_size=CHUNK)
    assert retriever.retrieve([query]).doc_ids == [["new"]]
    store.delete_documents(["new"])
    assert retriever.retrieve([query]).doc_ids == [["old"]]
    ingest([Document("old", "apples")], store, tokenizer, embedder, chunk_size=CHUNK)
    found = retriever.retrieve([query])
    assert tokenizer.decode(found.ids[0, 0][found.attention_mask[0, 0]].tolist()) == "apples"


def test_a_remembered_chunk_is_not_searched_again(place, tokenizer, embedder, documents, monkeypatch):
    store = build(place, documents, tokenizer, embedder)
    retriever = MilvusRetriever(store, tokenizer, embedder, cache_size=4)
    queries = [c.tokens for c in some_chunks(documents, tokenizer, 5)]
    first = retriever.retrieve(queries[:4])
    monkeypatch.setattr(store.connection.client, "search", lambda *a, **k: pytest.fail("searched"))
    again = retriever.retrieve(queries[3::-1])
    assert torch.equal(again.ids, first.ids.flip(0)) and again.doc_ids == first.doc_ids[::-1]
    monkeypatch.undo()
    retriever.retrieve(queries)
    assert len(retriever._cache) == 4


@pytest.mark.parametrize("attempt", range(4))
def test_concurrent_ingestions_lose_no_document(place, tokenizer, embedder, documents, attempt):
    """They create the same collection and share documents.

    A race needs several attempts to show.
    """
    shares = [documents[:32], documents[16:], documents[8:40]]
    stores = [place.store() for _ in shares]
    errors = []

    def run(store, share):
        try:
            ingest(share, store, tokenizer, embedder, chunk_size=CHUNK)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=item) for item in zip(stores, shares, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert rows_of(stores[0]) == expected_rows(documents, tokenizer) and stores[1].count() == len(rows_of(stores[0]))


@pytest.mark.parametrize(
    "kind", ["HNSW:M=8,efConstruction=64,ef=200", "IVF_FLAT:nlist=8,nprobe=8", "FLAT", "AUTOINDEX"]
)
def test_another_index_keeps_the_rows_and_finds_the_same(place, tokenizer, embedder, documents, kind):
    store = build(place, documents, tokenizer, embedder)
    store.reindex(IndexSettings.parse(kind))
    assert rows_of(store) == expected_rows(documents, tokenizer)
    retriever = MilvusRetriever(place.store(), tokenizer, embedder, num_neighbors=2)
    assert retriever.store.health()["index"].startswith(kind.partition(":")[0])
    queries = [c.tokens for c in some_chunks(documents, tokenizer, 10)]
    same(retriever.retrieve(queries), exact(queries, lambda n, c: True, documents, tokenizer, embedder, 2))


def test_an_import_equals_its_export(place, tokenizer, embedder, documents, tmp_path):
    from datasets import load_dataset

    tagged = [Document(d.id, d.text, METADATA[i % len(METADATA)]) for i, d in enumerate(documents)]
    store = build(place, tagged, tokenizer, embedder)
    count = export_knowledge_base(store, tmp_path / "out", tokenizer)
    assert count == store.count()
    rows = load_dataset("parquet", data_files=str(tmp_path / "out/data/*.parquet"), split="train")
    texts = {(c.doc_id, c.index): tokenizer.decode(c.tokens) for c in chunk_documents(documents, tokenizer, CHUNK)}
    assert {(row["doc_id"], row["chunk_index"]): row["text"] for row in rows} == texts

    copy = place.store(f"{place.name}_copy")
    for _ in range(2):  # again, as after an interruption
        assert import_knowledge_base(str(tmp_path / "out"), copy) == count
        assert rows_of(copy) == rows_of(store)
    assert copy.sources() == store.sources() == ["web", "wiki", 'wiki" or year > 0']
    queries = [c.tokens for c in some_chunks(documents, tokenizer, 5)]
    before, after = (MilvusRetriever(s, tokenizer, embedder, num_neighbors=3).retrieve(queries) for s in (store, copy))
    np.testing.assert_allclose(after.scores, before.scores, atol=1e-6)
    with pytest.raises(KnowledgeBaseError, match="exists already"):
        export_knowledge_base(store, tmp_path / "out", tokenizer)
    other = train_tokenizer([documents[0].text], 300)
    another = place.store(f"{place.name}_other")
    ingest(documents[:1], another, type(tokenizer)(other), embedder, chunk_size=CHUNK)
    with pytest.raises(IdentityMismatch, match="tokenizer_fingerprint"):
        import_knowledge_base(str(tmp_path / "out"), another)


def test_a_damaged_export_is_refused(place, tokenizer, embedder, documents, tmp_path):
    from datasets import Dataset, load_dataset

    store = build(place, documents[:2], tokenizer, embedder)
    export_knowledge_base(store, tmp_path / "out", tokenizer)
    (file,) = (tmp_path / "out/data").glob("*.parquet")
    rows = load_dataset("parquet", data_files=str(file), split="train").to_list()
    rows[0]["tokens"] = [tokenizer.vocab_size]
    Dataset.from_list(rows).to_parquet(file)
    with pytest.raises(KnowledgeBaseError, match="damaged.*does not have a chunk's tokens"):
        import_knowledge_base(str(tmp_path / "out"), place.store(f"{place.name}_copy"))


def test_vector_types_and_indexes_that_milvus_lacks_are_refused(place, tokenizer, embedder):
    identity = Identity.of(tokenizer, embedder, CHUNK)
    store = place.store()
    with pytest.raises(KnowledgeBaseError, match="float16 vectors need a Milvus server 2.4"):
        store.create(identity, NewCollection(vector_dtype="float16"))
    message = (
        "Milvus Lite cannot build IVF_RABITQ" if place.is_lite else "needs Milvus 2.6 or newer, this server is 2.3"
    )
    with pytest.raises(KnowledgeBaseError, match=message):
        store.create(identity, NewCollection(IndexSettings.parse("IVF_RABITQ")))
    assert not store.exists()


anything = st.text(st.characters(exclude_categories=()), min_size=1, max_size=60)
text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=60)
HOSTILE = [
    '" or doc_id != "',
    "\\",
    '\\"',
    "'\"\\",
    "\n",
    "a\nb\tc",
    "\0",
    "\x01",
    "\u202eabc",
    "k" * 1024,
    "') or ('1' == '1",
    "{x}",
    "%s",
    "*",
    "é" * 100,
    "🙂" * 200,
]
hostile = st.sampled_from(HOSTILE)
values = st.one_of(
    text, hostile, st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False, allow_infinity=False)
)


def test_any_id_text_and_metadata_are_data(place, tokenizer, embedder):
    # A server takes seconds to make a collection: use fewer of them, with more documents.
    examples, most = (25, 6) if place.is_lite else (6, 25)
    drawn_documents = st.dictionaries(
        st.one_of(text, hostile), st.tuples(st.one_of(text, hostile), values), min_size=most // 3, max_size=most
    )

    @settings(
        max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
    )
    @given(drawn_documents)
    @example({id_: (f"text number {number} of a list", id_) for number, id_ in enumerate(HOSTILE)})
    def check(drawn):
        documents = [Document(id_, text, {"value": value}) for id_, (text, value) in drawn.items()]
        store = place.store(f"{place.name}_h")
        if store.exists():
            store.connection.drop_collection(store.collection_name)
        ingest(documents, store, tokenizer, embedder, chunk_size=CHUNK)
        assert rows_of(store) == expected_rows(documents, tokenizer)
        stored = {row["doc_id"]: row["metadata"] for row in store.scan(("doc_id", "metadata"))}
        assert stored == {document.id: document.metadata for document in documents}
        for document in documents:
            with_it = {d.id for d in documents if equal(d.metadata["value"], document.metadata["value"])}
            retriever = MilvusRetriever(
                store, tokenizer, embedder, num_neighbors=600, filter={"value": document.metadata["value"]}
            )
            assert set(retriever.retrieve([[5]]).doc_ids[0]) - {None} == with_it
            found = retriever.retrieve([[5]], exclude_doc_ids=[{document.id}])
            assert set(found.doc_ids[0]) - {None} == with_it - {document.id}
        store.delete_documents([documents[0].id])
        assert rows_of(store) == expected_rows(documents[1:], tokenizer)

    check()


def equal(a, b):
    return isinstance(a, bool) == isinstance(b, bool) and a == b


@given(anything, anything, anything)
@example("id", "\ud800", "value")
@example("id", "a\udfffb", "value")
def test_invalid_text_is_refused(id_, body, value):
    try:
        for part in (id_, body, value):
            part.encode()
    except UnicodeEncodeError:
        with pytest.raises(ValueError, match="lone surrogate"):
            Document(id_, body, {"value": value})
    else:
        Document(id_, body, {"value": value})
