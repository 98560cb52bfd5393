"""Parts of a knowledge base are nested, and searched as if nothing else were there."""

import copy
import pydoc_data.topics

import numpy as np
import pytest

from evaluation_retro.nested_bases import changed_retriever, nested_parts, part_retriever
from retrieval import BulkTokenizer, Document, Embedder
from retrieval.rows import doc_key
from retrieval.searches import FUSED

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
    """Return bounds of each chunk's score in a knowledge base of these documents alone.

    Rounding moves a score a little. Chunks with equal scores can have any rank among themselves, so
    the score of a fused search, which is made of ranks, has wider bounds.
    """
    numbers = [number for number, chunk in enumerate(built.chunks) if chunk.doc_id in inside]
    places = [(built.chunks[number].doc_id, built.chunks[number].index) for number in numbers]

    def scores(search):
        alone = copy.copy(built)
        alone.search, alone.texts = search, [built.texts[number] for number in numbers]
        return np.array(alone.scores(query))

    if built.search != "hybrid":
        there = scores(built.search)
        wanted = (there > 0) | (built.search == "dense")
        return {place: (score - 1e-4, score + 1e-4) for place, score in zip(places, there, strict=True)}, wanted.sum()
    bounds = np.zeros((len(places), 2))
    for search in ("dense", "bm25"):
        there = scores(search)
        for number, score in enumerate(there):
            if score > 0 or search == "dense":
                best, worst = (there > score + 1e-5).sum() + 1, (there >= score - 1e-5).sum()
                bounds[number] += [1 / (60 + worst) if worst <= FUSED else 0, 1 / (60 + best) if best <= FUSED else 0]
    return dict(zip(places, bounds.tolist(), strict=True)), (bounds[:, 0] > 0).sum()


def test_neighbors_are_those_of_a_knowledge_base_of_only_these_documents(built, documents):
    whole = built.retriever(num_neighbors=K)
    queries = [list(chunk.tokens) for chunk in built.chunks[::7]]
    changed = False
    for part in nested_parts(built.store, SHARES):
        inside = {document.id for document in documents_of(part, documents)}
        with part_retriever(whole, part) as retriever:
            found = retriever.retrieve(queries)
        for number, query in enumerate(queries):
            bounds, matching = truth(built, inside, query)
            got = [
                (doc_id, int(found.chunk_indices[number, place]))
                for place, doc_id in enumerate(found.doc_ids[number])
                if doc_id is not None
            ]
            assert len(got) == min(K, matching) and len(set(got)) == len(got)
            worst_found = min((bounds[place][1] for place in got), default=np.inf)  # fails for another document
            assert all(low <= worst_found for place, (low, _) in bounds.items() if place not in got)
            if built.search != "hybrid":  # BM25's too, which are of the part's own word statistics
                for place, score in zip(got, found.scores[number].tolist(), strict=False):
                    assert bounds[place][0] <= score <= bounds[place][1]
        changed |= found.doc_ids != whole.retrieve(queries).doc_ids
    assert changed


def test_a_changed_retriever_keeps_the_other_settings(built):
    retriever = built.retriever(num_neighbors=2, neighbor_length=SIZE)
    more = changed_retriever(retriever).with_neighbors(5)
    assert (more.num_neighbors, more.neighbor_length, more.search) == (5, SIZE, built.search)
    assert more.retrieve([[5, 6, 7]]).ids.shape == (1, 5, SIZE)
