"""Search by words in a collection that grows."""

import pydoc_data.topics

import pytest

from retrieval import Document, IdentityMismatch, MilvusRetriever, MilvusStore, ingest

from ..support.searched import SIZE


@pytest.fixture
def uri(tmp_path):
    return str(tmp_path / "kb.db")


def test_a_document_that_is_added_later_is_found_by_its_own_words_and_meaning(uri, tokenizer, embedder):
    store = MilvusStore(uri, "words")
    topics = list(pydoc_data.topics.topics.values())[:40]
    documents = [Document(f"topic {number}", text[:1500]) for number, text in enumerate(topics)]
    ingest(documents, store, tokenizer, embedder, chunk_size=SIZE, search="hybrid")
    text = "the quokka flies over wombat hills and the quokka sleeps"
    ingest([Document("new", text)], store, tokenizer, embedder, chunk_size=SIZE, search="hybrid")
    query = tokenizer.encode_batch([text])[0][:SIZE]
    found = MilvusRetriever(store, tokenizer, embedder).retrieve([query])
    store.close()
    assert found.doc_ids[0][0] == "new"


def test_search_by_meaning_asked_of_a_collection_of_words(uri, documents, tokenizer, embedder):
    store = MilvusStore(uri, "words")
    ingest(documents, store, tokenizer, chunk_size=SIZE, search="bm25")
    with pytest.raises(IdentityMismatch, match="its search is 'bm25', yours is 'dense'"):
        ingest(documents, store, tokenizer, embedder, chunk_size=SIZE, search="dense")
    store.close()
