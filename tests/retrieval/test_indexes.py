"""Index settings are complete and in range before Milvus sees them."""

import pytest

from retrieval import IndexSettings, MilvusStore, NewCollection, ingest
from retrieval.indexes import KINDS, recommend


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FAISS", "There is no index 'FAISS'; there are FLAT"),
        ("HNSW:nlist=3", "HNSW has no parameter 'nlist'; it has M, efConstruction, ef"),
        ("HNSW:M=1", "between 2 and 2048, not 1"),
        ("HNSW:M=many", "whole number"),
        ("HNSW:M", "not of the form"),
        ("FLAT:ef=3", "it has none"),
    ],
)
def test_wrong_index_settings_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        IndexSettings.parse(text)


def test_index_settings_have_defaults():
    settings = IndexSettings.parse("hnsw:M=32")
    assert settings.build == {"M": 32, "efConstruction": 200} and settings.search == {"ef": 64}
    assert settings.search_params(500) == {"params": {"ef": 500}}
    assert IndexSettings.parse("IVF_FLAT:nlist=16").search == {"nprobe": 16}
    for kind in KINDS:
        IndexSettings.parse(kind)


@pytest.mark.parametrize(("is_lite", "kinds"), [(False, ["FLAT", "HNSW", "DISKANN"]), (True, ["FLAT", "HNSW", "HNSW"])])
def test_the_recommended_index_depends_on_the_number_of_rows(is_lite, kinds):
    assert [recommend(rows, is_lite=is_lite).kind for rows in (1000, 10**6, 10**9)] == kinds


def test_parts_of_a_vector_must_divide_its_dimension():
    with pytest.raises(ValueError, match="must divide the dimension 384"):
        IndexSettings.parse("IVF_PQ:m=5").check("here", is_lite=False, version=(2, 3), dimension=384)


def test_milvus_lite_builds_with_the_parameters_that_are_asked_for(tmp_path, documents, tokenizer, embedder):
    store = MilvusStore(str(tmp_path / "kb.db"), "c")
    ingest(documents[:3], store, tokenizer, embedder, new=NewCollection(IndexSettings.parse("HNSW:M=8")))
    built = store.connection.describe_index("c", "embedding")
    assert built["params"] == {"M": 8, "efConstruction": 200}
    store.close()
