"""Parts of a knowledge base are nested, and searched as if nothing else were there."""

import pydoc_data.topics

import pytest

from evaluation_retro.nested_bases import changed_retriever, nested_parts, part_retriever
from retrieval import BulkTokenizer, Document, Embedder
from retrieval.rows import doc_key

from ..support.bm25 import reciprocal_rank_fusion
from ..support.searched import SIZE, Built

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
K = 4


@pytest.fixture(scope="module")
def documents():
    topics = list(pydoc_data.topics.topics.values())[:16]
    return [Document(f"topic {number}", text[:400]) for number, text in enumerate(topics)]


@pytest.fixture(scope="module", params=["dense", "bm25", "hybrid"])
def built(request, world, tokenizer, documents, tmp_path_factory):
    embedder = Embedder(str(world / "embedding"), device="cpu")
    place = str(tmp_path_factory.mktemp("searched") / "kb.db")
    whole = Built(place, request.param, documents, BulkTokenizer(tokenizer), embedder)
    yield whole
    whole.store.close()


def documents_of(part, documents):
    return [document for document in documents if doc_key(document.id) <= part.last_key]


def test_each_part_contains_the_smaller_ones(built, documents):
    parts = nested_parts(built.store, SHARES)
    for smaller, larger in zip(parts, parts[1:], strict=False):
        few, many = ({document.id for document in documents_of(part, documents)} for part in (smaller, larger))
        assert few < many
    for part in parts:
        inside = {document.id for document in documents_of(part, documents)}
        assert len(inside) == part.documents
        chunks = [chunk for chunk in built.chunks if chunk.doc_id in inside]
        assert len(chunks) == part.chunks == built.store.count(part.expression)
        assert part.chunks >= part.share * len(built.chunks)
    assert parts[-1].chunks == len(built.chunks)


def truth(built, inside, query):
    """Return the best chunks of a knowledge base of these documents alone, by exact search."""
    numbers = [number for number, chunk in enumerate(built.chunks) if chunk.doc_id in inside]
    texts = [built.texts[number] for number in numbers]

    def ranked(search):
        alone = Built.__new__(Built)
        alone.search, alone.tokenizer, alone.embedder, alone.texts = search, built.tokenizer, built.embedder, texts
        scores = alone.scores(query)
        order = sorted(range(len(texts)), key=lambda place: -scores[place])
        return [(built.chunks[numbers[place]], scores[place]) for place in order if search == "dense" or scores[place]]

    if built.search != "hybrid":
        return {(chunk.doc_id, chunk.index): score for chunk, score in ranked(built.search)}
    fused = [[(chunk.doc_id, chunk.index) for chunk, _ in ranked(search)[:32]] for search in ("dense", "bm25")]
    return reciprocal_rank_fusion(*fused)


def test_neighbors_are_those_of_a_knowledge_base_of_only_these_documents(built, documents):
    whole = built.retriever(num_neighbors=K)
    queries = [list(chunk.tokens) for chunk in built.chunks[::7]]
    changed = False
    for part in nested_parts(built.store, SHARES):
        inside = {document.id for document in documents_of(part, documents)}
        with part_retriever(whole, part) as retriever:
            found = retriever.retrieve(queries)
        for number, query in enumerate(queries):
            expected = truth(built, inside, query)
            got = [
                (doc_id, int(found.chunk_indices[number, place]))
                for place, doc_id in enumerate(found.doc_ids[number])
                if doc_id is not None
            ]
            assert len(got) == min(K, len(expected)) and len(set(got)) == len(got)
            # equal scores may come in any order
            best = sorted(expected.values(), reverse=True)[: len(got)]
            assert sorted((expected[place] for place in got), reverse=True) == pytest.approx(best, abs=1e-4)
        changed |= found.doc_ids != whole.retrieve(queries).doc_ids
    assert changed


def test_a_changed_retriever_keeps_the_other_settings(built):
    retriever = built.retriever(num_neighbors=2, neighbor_length=SIZE)
    more = changed_retriever(retriever, num_neighbors=5)
    assert (more.num_neighbors, more.neighbor_length, more.search) == (5, SIZE, built.search)
    assert more.retrieve([[5, 6, 7]]).ids.shape == (1, 5, SIZE)
