"""Search by meaning, by words and by both, on Milvus Lite; the truth is plain Python and numpy."""

import math
import os
import subprocess
import sys
import textwrap

import numpy as np
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pymilvus import MilvusException

from retrieval import (
    Document,
    IdentityMismatch,
    IndexSettings,
    KnowledgeBaseError,
    MilvusRetriever,
    MilvusStore,
    NewCollection,
    export_knowledge_base,
    import_knowledge_base,
    ingest,
    write_bulk_files,
)
from retrieval.searches import FUSED, bounded

from ..support.bm25 import reciprocal_rank_fusion
from ..support.places import CHUNK, expected_rows, rows_of
from ..support.searched import SIZE, Built, longest_common_run, queries_of


@pytest.fixture(params=["dense", "bm25", "hybrid"])
def search(request):
    return request.param


@pytest.fixture
def built(uri, search, documents, tokenizer, embedder):
    built = Built(uri, search, documents, tokenizer, embedder)
    yield built
    built.store.close()


def test_rows_are_those_of_the_documents_and_are_written_once(built):
    assert built.store.count() == len(built.chunks) == built.report.chunks_written
    again = ingest(built.documents, built.store, built.tokenizer, built.embedder, chunk_size=SIZE, search=built.search)
    assert again.chunks_written == 0 and again.chunks_unchanged == len(built.chunks)


def test_scores_are_bounded_and_those_of_the_formula(built):
    queries, _ = queries_of(built)
    found = built.retriever(num_neighbors=4).retrieve(queries)
    for number, query in enumerate(queries):
        truth = built.scores(query)
        there = [place for place in range(4) if found.doc_ids[number][place] is not None]
        got = found.scores[number, there].tolist()
        np.testing.assert_allclose(got, [truth[built.row(found, number, place)] for place in there], atol=1e-4)
        assert all(-1.0001 <= score <= 1.0001 for score in got)
        if built.search != "hybrid":  # the best k there are
            best = sorted((score for score in truth if built.search == "dense" or score > 0), reverse=True)[:4]
            np.testing.assert_allclose(got, best, atol=1e-4)


def test_a_fused_search_is_the_reciprocal_rank_fusion_of_the_two(uri, documents, tokenizer, embedder):
    built = Built(uri, "hybrid", documents, tokenizer, embedder)
    retriever = built.retriever(num_neighbors=5)
    queries, _ = queries_of(built)
    found = retriever.retrieve(queries)
    texts = [tokenizer.decode(query) for query in queries]
    near = built.store.search(embedder.encode(texts), FUSED)
    shared = built.store.search_words(texts, FUSED)
    for number in range(len(queries)):
        gains = reciprocal_rank_fusion(
            *([(row["doc_id"], row["chunk_index"]) for row in rows] for rows in (near[number], shared[number]))
        )
        got = [(d, int(i)) for d, i in zip(found.doc_ids[number], found.chunk_indices[number], strict=True)]
        best = sorted(gains.values(), reverse=True)[:5]
        np.testing.assert_allclose([gains[place] for place in got], best, atol=1e-7)
        ranks = [(-round(gains[place], 8), *place) for place in got]
        assert ranks == sorted(ranks)  # ties are ordered by document and chunk
    assert retriever.retrieve(queries).doc_ids == found.doc_ids


def test_a_batch_is_one_request(built, monkeypatch):
    client, calls = built.store.connection.client, []
    for name in ("search", "hybrid_search", "query"):
        call = getattr(client, name)
        monkeypatch.setattr(
            client, name, lambda *args, name=name, call=call, **kwargs: calls.append(name) or call(*args, **kwargs)
        )
    queries = [list(chunk.tokens) for chunk in built.chunks[:20]]
    built.retriever().retrieve(queries)
    assert calls == ["query", "hybrid_search" if built.search == "hybrid" else "search"]  # the first counts rows


def test_exclusion_is_exact_among_near_copies(uri, search, documents, tokenizer, embedder):
    copies = [Document(f"near {i}", documents[0].text[:200] + f" v{i % 7}") for i in range(100)]
    built = Built(uri, search, documents + copies, tokenizer, embedder)
    near, ids = {d.id for d in copies}, {d.id for d in built.documents}
    sets = [near, near | {"topic 0"}, ids - {"topic 5"}, ids, ids - {"near 3", "near 99"}, set()]
    queries, _ = queries_of(built, 18)
    excluded = [sets[i % len(sets)] for i in range(len(queries))]
    found = built.retriever(num_neighbors=3).retrieve(queries, exclude_doc_ids=excluded)
    for number, (query, keys) in enumerate(zip(queries, excluded, strict=True)):
        there = [doc_id for doc_id in found.doc_ids[number] if doc_id is not None]
        assert not keys & set(there)
        scores = built.scores(query)
        allowed = [s for s, c in zip(scores, built.chunks, strict=True) if c.doc_id not in keys]
        if search == "bm25":
            allowed = [score for score in allowed if score > 0]
        assert len(there) == min(3, len(allowed))
        if search != "hybrid":
            np.testing.assert_allclose(found.scores[number, : len(there)], sorted(allowed, reverse=True)[:3], atol=1e-4)


def test_a_coarse_index_still_gives_k_neighbors(uri, documents, tokenizer, embedder):
    """The vector index probes one list of many; words reach few rows through the filter."""
    coarse = NewCollection(IndexSettings.parse("IVF_FLAT:nlist=64,nprobe=1"))
    built = Built(uri, "hybrid", documents, tokenizer, embedder, new=coarse)
    queries, _ = queries_of(built)
    keys = {document.id for document in documents} - {"topic 8", "copy 3 of 1"}
    found = built.retriever(num_neighbors=4).retrieve(queries, exclude_doc_ids=[keys] * len(queries))
    for number, query in enumerate(queries):
        assert None not in found.doc_ids[number] and not keys & set(found.doc_ids[number])
        truth = built.scores(query)
        expected = [truth[built.row(found, number, place)] for place in range(4)]
        np.testing.assert_allclose(found.scores[number], expected, atol=1e-5)


def test_a_word_that_few_rows_share_ends_the_search(uri, tokenizer, monkeypatch):
    """Fewer rows than asked for are normal in a search by words."""
    documents = [Document(f"d{i}", f"common text number {i}") for i in range(50)] + [Document("rare", "zebra crossing")]
    built = Built(uri, "bm25", documents, tokenizer, None)
    (query,) = tokenizer.encode_batch(["zebra"])
    retriever, calls = built.retriever(num_neighbors=3), []
    search = built.store.connection.client.search
    monkeypatch.setattr(built.store.connection.client, "search", lambda *a, **k: calls.append(1) or search(*a, **k))
    monkeypatch.setattr(built.store, "search_exactly", lambda *a, **k: pytest.fail("read every row"))
    assert retriever.retrieve([query]).doc_ids == [["rare", None, None]]
    assert retriever.retrieve([query], exclude_doc_ids=[{"rare"}]).doc_ids == [[None] * 3]
    assert len(calls) == 2


def test_neighbors_that_share_a_long_run_are_left_out(built):
    whole = [chunk for chunk in built.chunks if len(chunk.tokens) == SIZE][:6]
    retriever = built.retriever(num_neighbors=3, max_leakage=0.25)
    found = retriever.retrieve([c.tokens for c in whole], continuations=[c.continuation for c in whole])
    for number, chunk in enumerate(whole):
        places = [place for place in range(3) if found.doc_ids[number][place] is not None]
        for place in places:
            other = built.chunks[built.row(found, number, place)]
            shared = longest_common_run((*chunk.tokens, *chunk.continuation), (*other.tokens, *other.continuation))
            assert shared <= SIZE // 4
        assert len(places) == 3


def test_filters_living_documents_and_the_memory_work(uri, search, tokenizer, embedder):
    documents = [Document(f"d{i}", f"apples and pears number {i}", {"year": 2000 + i}) for i in range(12)]
    built = Built(uri, search, documents, tokenizer, embedder)
    (query,) = tokenizer.encode_batch(["apples and pears"])
    found = built.retriever(num_neighbors=5, filter={"year": {">=": 2009}}).retrieve([query])
    assert set(found.doc_ids[0]) == {"d9", "d10", "d11", None}

    retriever = built.retriever(num_neighbors=1, cache_size=10)
    first = retriever.retrieve([query]).doc_ids[0][0]
    built.store.delete_documents([first])
    second = retriever.retrieve([query]).doc_ids[0][0]
    assert second not in (first, None)
    changed = [Document(second, "something else entirely"), Document("new", "apples and pears")]
    ingest(changed, built.store, tokenizer, built.embedder, chunk_size=SIZE)
    assert retriever.retrieve([query]).doc_ids == [["new"]]


def test_a_failed_search_raises_or_is_skipped(built, monkeypatch):
    def failing(*args, **kwargs):
        raise MilvusException(message="not now")

    retriever = built.retriever()
    name = "hybrid_search" if built.search == "hybrid" else "search"
    monkeypatch.setattr(built.store.connection.client, name, failing)
    with pytest.raises(KnowledgeBaseError, match=f"refused {name} on .*not now"):
        retriever.retrieve([[5]])
    retriever.on_retrieval_error = "skip"
    assert not retriever.retrieve([[5], [6]]).attention_mask.any() and retriever.skipped_chunks == 2


def test_an_import_equals_its_export(uri, search, documents, tokenizer, embedder, tmp_path):
    built = Built(uri, search, documents[:12], tokenizer, embedder)  # without near-copies, whose ranks are ties
    count = export_knowledge_base(built.store, tmp_path / "out", built.tokenizer)
    copy = MilvusStore(str(tmp_path / "copy.db"), "copy")
    assert import_knowledge_base(str(tmp_path / "out"), copy) == count == copy.count()
    assert rows_of(copy) == rows_of(built.store) and copy.identity() == built.store.identity()
    queries, keys = queries_of(built)
    before, after = (
        MilvusRetriever(store, built.tokenizer, built.embedder).retrieve(queries, exclude_doc_ids=keys)
        for store in (built.store, copy)
    )
    assert before.doc_ids == after.doc_ids and torch.equal(before.chunk_indices, after.chunk_indices)
    np.testing.assert_allclose(before.scores, after.scores, atol=1e-5)
    assert ("embeddings of" in (tmp_path / "out" / "README.md").read_text()) == (built.search != "bm25")
    copy.close()


def test_bulk_files_hold_the_rows_of_an_ingestion(built, tmp_path):
    folder = tmp_path / "bulk"
    settings = {"chunk_size": SIZE, "search": built.search}
    write_bulk_files(built.documents, folder, built.tokenizer, built.embedder, **settings)
    again = write_bulk_files(built.documents, folder, built.tokenizer, built.embedder, **settings)
    assert again.chunks_written == 0 and again.chunks_unchanged == len(built.chunks)
    (part,) = folder.glob("*.parquet")
    rows = {row["pk"]: row for row in pyarrow.parquet.read_table(part).to_pylist()}
    columns = {"dense": ["embedding"], "bm25": ["text"], "hybrid": ["embedding", "text"]}[built.search]
    same = ["doc_id", "doc_key", "chunk_index", "content_hash", *(name for name in columns if name == "text")]
    stored = list(built.store.scan([*same, *columns]))
    assert len(stored) == len(rows)
    for row in stored:
        written = rows[row["pk"]]
        assert [written[name] for name in same] == [row[name] for name in same]
        if "embedding" in columns:
            np.testing.assert_allclose(written["embedding"], row["embedding"], atol=1e-6)
        assert {"embedding", "text", "words"} & written.keys() == set(columns)
    with pytest.raises(IdentityMismatch, match="files of another knowledge base"):
        other = {**settings, "search": "bm25", "analyzer": "code"}
        write_bulk_files(built.documents, folder, built.tokenizer, **other)


def test_a_hybrid_collection_is_searched_in_all_three_ways(uri, search, documents, tokenizer, embedder):
    both = Built(uri, "hybrid", documents, tokenizer, embedder)
    one = Built(uri, search, documents, tokenizer, embedder) if search != "hybrid" else both
    queries, _ = queries_of(both)
    retriever = MilvusRetriever(both.store, tokenizer, one.embedder, search=search)
    assert retriever.search == search and (retriever.embedding_model is None) == (search == "bm25")
    loaded, given = (embedder and embedder.model for embedder in (retriever.embedder, one.embedder))
    assert loaded is given
    expected, found = one.retriever().retrieve(queries), retriever.retrieve(queries)
    assert found.doc_ids == expected.doc_ids
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)


class TestQueries:
    def test_special_tokens_are_not_searched_for(self, built):
        queries, _ = queries_of(built)
        end = built.tokenizer.eos_token_id
        query = queries[0][:-2]
        found = built.retriever().retrieve([query, [end, *query], [*query[:3], end, *query[3:], end]])
        assert found.doc_ids[0] == found.doc_ids[1] == found.doc_ids[2]
        assert torch.equal(found.scores[0], found.scores[1])

    def test_a_query_without_text_has_no_neighbors_and_no_search(self, built, monkeypatch):
        end = built.tokenizer.eos_token_id
        retriever = built.retriever(cache_size=3)
        queries, keys = queries_of(built)
        found = retriever.retrieve([[end], queries[0], [end] * SIZE], exclude_doc_ids=[set(), keys[0], {"topic 1"}])
        assert not found.attention_mask[[0, 2]].any() and found.attention_mask[1].any()
        for name in ("search", "hybrid_search"):
            monkeypatch.setattr(built.store.connection.client, name, lambda *a, **k: pytest.fail("searched"))
        assert retriever.retrieve([[end] * 2]).doc_ids == [[None, None]]

    @pytest.mark.parametrize("length", [0, SIZE + 1])
    def test_a_length_out_of_range_is_refused(self, built, length):
        with pytest.raises(ValueError, match=rf"chunks\[1\] has {length} tokens. Search for 1 to {SIZE}"):
            built.retriever().retrieve([[5], [5] * length])

    def test_text_is_data_also_as_a_query(self, built):
        for text in ('" or pk > "', "\\", "\0", "') or 1", "a:b^2 -c +d", "\u202eabc"):
            (query,) = built.tokenizer.encode_batch([text])
            built.retriever().retrieve([query[:SIZE]])


@given(st.floats(0, 1e4), st.floats(0, 1e4), st.text(max_size=40))
def test_a_bm25_score_becomes_a_bounded_one_in_the_same_order(one, other, text):
    low, high = sorted((one, other))
    assert 0 <= bounded(low, text) <= bounded(high, text) < 1
    if high - low > 1e-6 * high:
        assert bounded(low, text) < bounded(high, text)


def test_a_bounded_score_does_not_grow_with_the_query_alone():
    """A query of ten times as many words, each as telling, has the same score."""
    short, long = "alpha beta", " ".join(f"word{i}" for i in range(20))
    assert math.isclose(bounded(3.0, short), bounded(30.0, long))


WITHOUT_A_MODEL = """
    import sys
    from transformers import AutoTokenizer
    from configuration_retro import RetroConfig
    from modeling_retro import RetroForCausalLM
    from retrieval import BulkTokenizer, Document, MilvusRetriever, MilvusStore, ingest
    import torch

    uri, folder = sys.argv[1:]
    tokenizer = BulkTokenizer(AutoTokenizer.from_pretrained(folder))
    store = MilvusStore(uri, "words")
    ingest([Document("a", "apples and pears and plums " * 9)], store, tokenizer, chunk_size=8, search="bm25")
    store.close()
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64, "cca_layers": [1], "chunk_size": 8}
    model = RetroForCausalLM(RetroConfig(vocab_size=len(tokenizer.hf_tokenizer), **sizes)).eval()
    retriever = MilvusRetriever.from_uri(uri, "words", tokenizer=tokenizer)
    assert retriever.embedder is None and retriever.embedding_model is None and retriever.search == "bm25"
    model.set_retriever(retriever)
    (prompt,) = tokenizer.encode_batch(["apples and pears and plums apples and pears"])
    model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False)
    assert retriever.retrieve([prompt[:8]]).doc_ids[0][0] == "a"
    loaded = {"sentence_transformers"} & sys.modules.keys()
    assert not loaded, loaded
    print("done")
"""


def test_neither_ingestion_nor_generation_loads_an_embedding_model(uri, tokenizer_folder):
    program = [sys.executable, "-c", textwrap.dedent(WITHOUT_A_MODEL), uri, str(tokenizer_folder)]
    result = subprocess.run(
        program, env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and result.stdout.strip().endswith("done"), result.stderr


def test_documents_that_are_copied_between_collections_keep_their_rows(uri, documents, tokenizer, tmp_path):
    """An export of one collection adds to another one of the same identity."""
    one, other = MilvusStore(uri, "one"), MilvusStore(uri, "other")
    ingest(documents[:4], one, tokenizer, chunk_size=CHUNK, search="bm25")
    ingest(documents[4:8], other, tokenizer, chunk_size=CHUNK, search="bm25")
    export_knowledge_base(one, tmp_path / "out", tokenizer)
    import_knowledge_base(str(tmp_path / "out"), other)
    assert rows_of(other) == expected_rows(documents[:8], tokenizer)
