"""Settings of searches: what a collection records, its analyzer, and what is refused."""

import json
import math

import pytest

from retrieval import (
    Document,
    Identity,
    IdentityMismatch,
    IndexSettings,
    KnowledgeBaseError,
    MilvusRetriever,
    MilvusStore,
    NewCollection,
    export_knowledge_base,
    import_knowledge_base,
    ingest,
)
from retrieval.analyzers import MAX_TEXT_BYTES, parse_analyzer, searched_text

from ..support.bm25 import bm25
from ..support.searched import SIZE, Built, queries_of


class TestIdentity:
    def test_a_dense_collection_is_stored_as_before(self, uri, documents, tokenizer, embedder):
        built = Built(uri, "dense", documents[:2], tokenizer, embedder)
        stored = json.loads(built.store.identity().to_json())
        assert stored["format_version"] == 3 and not {"search", "analyzer"} & stored.keys()
        description = built.store.connection.describe_collection("dense")
        assert [field["name"] for field in description["fields"]][-1] == "embedding"
        assert built.store.connection.list_indexes("dense") == ["embedding"]

    def test_a_bm25_collection_has_no_vectors(self, uri, documents, tokenizer):
        built = Built(uri, "bm25", documents[:2], tokenizer, None)
        identity = built.store.identity()
        assert (identity.format_version, identity.search, identity.analyzer) == (4, "bm25", {"type": "standard"})
        assert identity.embedding_model is identity.embedding_dimension is identity.embedding_probe is None
        assert built.store.connection.list_indexes("bm25") == ["words"]
        assert "vectors" not in built.store.health() and "SPARSE" in built.store.health()["index of words"]
        assert Identity.from_json(identity.to_json(), "here") == identity
        params = built.store.connection.describe_index("bm25", "words")["params"]
        assert params == {"bm25_k1": 1.2, "bm25_b": 0.75}

    def test_other_searches_and_analyzers_do_not_share_rows(self, uri, documents, tokenizer, embedder, tmp_path):
        standard = Built(uri, "bm25", documents[:2], tokenizer, embedder)
        export_knowledge_base(standard.store, tmp_path / "out", tokenizer)
        code, hybrid = MilvusStore(uri, "code"), MilvusStore(uri, "hybrid")
        ingest(documents[:1], code, tokenizer, chunk_size=SIZE, search="bm25", analyzer="code")
        ingest(documents[:1], hybrid, tokenizer, embedder, chunk_size=SIZE, search="hybrid")
        with pytest.raises(IdentityMismatch, match="analyzer is {'type': 'code'} and {'type': 'standard'}"):
            import_knowledge_base(str(tmp_path / "out"), code)
        with pytest.raises(IdentityMismatch, match="search is 'hybrid' and 'bm25'"):
            import_knowledge_base(str(tmp_path / "out"), hybrid)
        with pytest.raises(IdentityMismatch, match="its analyzer is {'type': 'code'}, yours is {'type': 'standard'}"):
            ingest(documents, code, tokenizer, chunk_size=SIZE, search="bm25", analyzer="standard")
        with pytest.raises(IdentityMismatch, match="its search is 'hybrid', yours is 'bm25'"):
            ingest(documents, hybrid, tokenizer, chunk_size=SIZE, search="bm25")

    def test_an_ingestion_follows_the_collection_that_is_there(self, uri, documents, tokenizer):
        built = Built(uri, "bm25", documents[:2], tokenizer, None, analyzer="code")
        report = ingest(documents[:3], built.store, tokenizer, chunk_size=SIZE)
        assert report.chunks_unchanged == len(built.chunks) and report.chunks_written > 0

    def test_indexes_of_a_killed_ingestion_are_built(self, uri, documents, tokenizer, embedder):
        built = Built(uri, "hybrid", documents[:2], tokenizer, embedder)
        client = built.store.connection.client
        client.release_collection("hybrid")
        client.drop_index("hybrid", "words")
        client.drop_index("hybrid", "embedding") if client.list_indexes("hybrid") else None
        assert built.store.exists() and sorted(client.list_indexes("hybrid")) == ["embedding", "words"]

    def test_another_vector_index_leaves_the_words_searchable(self, uri, documents, tokenizer, embedder):
        built = Built(uri, "hybrid", documents, tokenizer, embedder)
        queries, _ = queries_of(built)
        before = built.retriever().retrieve(queries)
        built.store.reindex(IndexSettings.parse("HNSW:ef=400"))
        assert built.store.health()["index"].startswith("HNSW")
        assert built.retriever().retrieve(queries).doc_ids == before.doc_ids
        words_only = Built(uri, "bm25", documents[:2], tokenizer, None)
        with pytest.raises(KnowledgeBaseError, match="has no vectors.*SPARSE_INVERTED_INDEX, stays"):
            words_only.store.reindex(IndexSettings.parse("HNSW"))


class TestAnalyzers:
    @pytest.mark.parametrize(
        "text, expected",
        [
            ("readFile(read_file)", "read file readfile read file readfile"),
            ("getHTTPResponse2", "get http response 2 gethttpresponse2"),
            ("__init__ x1 naïveÉtude", "init x 1 x1 naïveétude"),
            ("a.b = 'c d'", "a b c d"),
        ],
    )
    def test_code_is_cut_into_the_words_of_its_identifiers(self, text, expected):
        assert searched_text(text, {"type": "code"}) == expected

    def test_a_search_finds_the_words_of_an_identifier(self, uri, tokenizer):
        documents = [Document("camel", "def readFile(): pass"), Document("other", "def writeLines(): pass")]
        for analyzer, expected in (("code", "camel"), ("standard", None)):
            store = MilvusStore(uri, analyzer)
            ingest(documents, store, tokenizer, chunk_size=SIZE, search="bm25", analyzer=analyzer)
            (query,) = tokenizer.encode_batch(["read_file"])
            found = MilvusRetriever(store, tokenizer, num_neighbors=1).retrieve([query])
            assert found.doc_ids == [[expected]]

    def test_a_query_of_code_is_scored_by_the_words_that_are_searched(self, uri, tokenizer):
        documents = [Document(f"d{i}", f"def readFile{i}(path): return {i}") for i in range(4)]
        built = Built(uri, "bm25", documents, tokenizer, None, analyzer="code")
        (query,) = tokenizer.encode_batch(["readFile2 returns"])
        found = built.retriever(num_neighbors=1).retrieve([query])
        texts = [searched_text(text, {"type": "code"}) for text in built.texts]
        asked = searched_text("readFile2 returns", {"type": "code"})  # read file 2 readfile2 returns
        best = max(bm25(asked, texts))
        assert math.isclose(found.scores[0, 0], best / (best + 5), abs_tol=1e-4)

    def test_stop_words_are_not_searched_for(self, uri, tokenizer):
        params = {"tokenizer": "standard", "filter": ["lowercase", {"type": "stop", "stop_words": ["the"]}]}
        store = MilvusStore(uri, "stop")
        documents = [Document("a", "the cat"), Document("b", "the dog")]
        ingest(documents, store, tokenizer, chunk_size=SIZE, search="bm25", analyzer=json.dumps(params))
        found = MilvusRetriever(store, tokenizer).retrieve(tokenizer.encode_batch(["the dog"]))
        assert found.doc_ids == [["b", None]] and store.identity().analyzer == params

    @pytest.mark.parametrize(
        "analyzer, message",
        [
            ("english", "type 'english'"),
            ('{"tokenizer": "klingon"}', "'klingon'"),
            ('{"tokenizer": "standard", "filter": [{"type": "stemmer", "language": "english"}]}', "filter .*stemmer"),
            ('{"tokenizer": "standard", "filter": [{"type": "stop", "stop_words": ["_english_"]}]}', "_english_"),
            ('{"tokenizer": "standard", "alphabet": 3}', "setting 'alphabet'"),
        ],
    )
    def test_what_milvus_lite_would_refuse_or_ignore_is_refused(self, uri, tokenizer, documents, analyzer, message):
        store = MilvusStore(uri, "none")
        with pytest.raises(KnowledgeBaseError, match=f"Milvus Lite does not know the .*{message}.*Use the analyzer"):
            ingest(documents, store, tokenizer, chunk_size=SIZE, search="bm25", analyzer=analyzer)
        assert not store.exists()

    @pytest.mark.parametrize("name", ["klingon", "{", "[1]", ""])
    def test_an_unknown_name_is_refused(self, name):
        with pytest.raises(ValueError, match=r"There is no analyzer|is not valid JSON"):
            parse_analyzer(name)

    def test_a_long_text_is_cut_between_two_characters(self):
        for text in ("é" * 40_000, "a" + "é" * 40_000, "🙂" * 20_000):
            cut = searched_text(text, {"type": "standard"})
            assert text.startswith(cut) and MAX_TEXT_BYTES - 4 < len(cut.encode()) <= MAX_TEXT_BYTES


class TestBadInput:
    def test_a_search_that_the_collection_was_not_built_for(self, uri, documents, tokenizer, embedder):
        dense, by_words = (Built(uri, kind, documents[:2], tokenizer, embedder) for kind in ("dense", "bm25"))
        for wanted in ("bm25", "hybrid"):
            given = None if wanted == "bm25" else embedder
            with pytest.raises(KnowledgeBaseError, match=f"built for search 'dense', and '{wanted}' is asked for"):
                MilvusRetriever(dense.store, tokenizer, given, search=wanted)
        for wanted in ("dense", "hybrid"):
            with pytest.raises(KnowledgeBaseError, match=f"built for search 'bm25', and '{wanted}' is asked for"):
                MilvusRetriever(by_words.store, tokenizer, embedder, search=wanted)
            with pytest.raises(KnowledgeBaseError, match=f"'{wanted}' is asked for"):
                MilvusRetriever.from_uri(uri, "bm25", tokenizer=tokenizer, search=wanted)

    def test_an_embedding_model_too_many_or_too_few(self, uri, documents, tokenizer, embedder):
        built = Built(uri, "hybrid", documents[:2], tokenizer, embedder)
        with pytest.raises(ValueError, match="'bm25' uses none. Leave it out"):
            MilvusRetriever(built.store, tokenizer, embedder, search="bm25")
        with pytest.raises(ValueError, match="'bm25' uses none. Leave it out"):
            MilvusRetriever.from_uri(uri, "hybrid", tokenizer=tokenizer, embedding_model="x", search="bm25")
        with pytest.raises(ValueError, match="Search 'hybrid' needs the embedding model"):
            MilvusRetriever(built.store, tokenizer)
        with pytest.raises(ValueError, match="There is no search 'both'. Use one of dense, bm25, hybrid"):
            MilvusRetriever(built.store, tokenizer, embedder, search="both")
        other = MilvusStore(uri, "other")
        with pytest.raises(ValueError, match="'bm25' uses none"):
            ingest(documents, other, tokenizer, embedder, search="bm25")
        with pytest.raises(ValueError, match="Search 'dense' needs an embedding model"):
            ingest(documents, other, tokenizer)
        with pytest.raises(ValueError, match="search 'dense' looks at no words"):
            ingest(documents, other, tokenizer, embedder, analyzer="code")
        assert not other.exists()

    def test_a_vector_index_for_a_search_by_words(self, uri, documents, tokenizer):
        store = MilvusStore(uri, "words")
        for new in (NewCollection(IndexSettings.parse("HNSW")), NewCollection(vector_dtype="float16")):
            with pytest.raises((ValueError, KnowledgeBaseError), match="has no vectors|float16 vectors need"):
                ingest(documents, store, tokenizer, search="bm25", new=new)
        assert not store.exists()

    @pytest.mark.server
    @pytest.mark.parametrize("wanted", ["bm25", "hybrid"])
    def test_a_server_without_bm25_is_refused(self, server, documents, tokenizer, embedder, wanted):
        store = MilvusStore(server.uri, f"old_{wanted}")
        with pytest.raises(KnowledgeBaseError, match="needs Milvus 2.5 or newer, this server is 2.3.*--search dense"):
            ingest(documents, store, tokenizer, None if wanted == "bm25" else embedder, search=wanted)
        assert not store.exists()
        store.close()
