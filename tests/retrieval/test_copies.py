"""Copies of a retriever.

They share its connection. Pickled and forked ones connect again and hold no secret.
"""

import copy
import os
import pickle
import shutil
from types import SimpleNamespace

import datasets
import pytest
import torch

from configuration_retro import RetroConfig
from data_retro.collator import RetroDataCollator
from modeling_retro import RetroForCausalLM
from retrieval import (
    BulkTokenizer,
    Embedder,
    IdentityMismatch,
    KnowledgeBaseError,
    MilvusAddress,
    MilvusConnection,
    MilvusRetriever,
    MilvusStore,
    ingest,
)
from retrieval.lite_file import LiteFile

from ..support.places import CHUNK

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*multi-threaded, use of fork",  # Python's, of any process with threads
    "ignore:.*quantiz",  # torch's, of `quantize_dynamic`
)
QUERIES = [[7 + number] * CHUNK for number in range(6)]


def build(uri, documents, tokenizer, embedder):
    store = MilvusStore(uri, "retro")
    ingest(documents, store, tokenizer, embedder, chunk_size=CHUNK)
    return MilvusRetriever(store, tokenizer, embedder, cache_size=10)


@pytest.fixture(scope="module")
def retriever(tmp_path_factory, documents, tokenizer, embedder):
    retriever = build(tmp_path_factory.mktemp("copies") / "kb.db", documents[:8], tokenizer, embedder)
    yield retriever
    retriever.close()


@pytest.fixture(scope="module")
def expected(retriever):
    return retriever.retrieve(QUERIES)


def small_model(tokenizer, retriever=None):
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    sizes = {"n_positions": 64, "n_layer": 2, "n_embd": 16, "n_head": 2, "cca_layers": [1], "encoder_num_layers": 1}
    config = RetroConfig(
        vocab_size=tokenizer.vocab_size, chunk_size=CHUNK, bos_token_id=end, eos_token_id=end, copy_head=True, **sizes
    )
    model = RetroForCausalLM(config, retriever=retriever).eval()
    for parameter in model.parameters():  # layers that start as a no-op would hide the neighbors
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def same(found, expected):
    assert torch.equal(found.ids, expected.ids) and found.doc_ids == expected.doc_ids


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda retriever: pickle.loads(pickle.dumps(retriever))]
)
def test_a_copy_of_a_retriever_finds_the_same(retriever, expected, duplicate):
    twin = duplicate(retriever)
    same(twin.retrieve(QUERIES), expected)
    assert twin is not retriever and twin._lock is not retriever._lock and twin._cache is not retriever._cache
    if twin.store.connection is not retriever.store.connection:
        twin.close()
    same(retriever.retrieve(QUERIES), expected)  # closing what was pickled closes nothing else


def test_a_copy_of_a_model_reads_the_same(retriever, tokenizer):
    model = small_model(tokenizer, retriever)
    tokens = torch.tensor([QUERIES[0] + QUERIES[1] + QUERIES[2]])
    expected = model(tokens).logits
    assert not torch.allclose(expected, small_model(tokenizer)(tokens).logits)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    pickled = pickle.loads(pickle.dumps(model))
    copies = [copy.deepcopy(model), copy.deepcopy(model.to("cpu")), averaged.module, pickled]
    for twin in copies:
        torch.testing.assert_close(twin(tokens).logits, expected)
    pickled.retriever.close()
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert quantized(tokens).logits.shape == expected.shape
    assert quantized.retriever.embedder is model.retriever.embedder  # shared, not copied


def test_after_closing_one_copy_the_others_say_so(tmp_path, documents, tokenizer, embedder):
    retriever = build(tmp_path / "kb.db", documents[:2], tokenizer, embedder)
    twin = copy.deepcopy(retriever)
    retriever.close()
    with pytest.raises(KnowledgeBaseError, match="kb.db was closed, by this object or a copy of it: open it again"):
        twin.retrieve(QUERIES)


def test_a_saved_model_loads_without_its_knowledge_base(tmp_path, documents, tokenizer, embedding_folder):
    """Loading needs neither the knowledge base nor the embedding model.

    The first search says what is missing.
    """
    moved = shutil.copytree(embedding_folder, tmp_path / "embedding")
    retriever = build(tmp_path / "kb.db", documents[:2], tokenizer, Embedder(moved, device="cpu"))
    model = small_model(tokenizer, retriever)
    tokens = torch.tensor([QUERIES[0]])
    expected = model(tokens).logits
    torch.save(model, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_size < 2**20  # without the embedding model's weights
    retriever.close()
    (tmp_path / "kb.db").rename(tmp_path / "elsewhere.db")
    moved.rename(tmp_path / "elsewhere")

    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    with pytest.raises(KnowledgeBaseError, match=r"no knowledge base file .*kb\.db: build it"):
        loaded(tokens)
    assert not (tmp_path / "kb.db").exists()  # nothing is made in its place
    (tmp_path / "elsewhere.db").rename(tmp_path / "kb.db")
    with pytest.raises(OSError, match=r"Cannot load the embedding model '.*/embedding'"):
        loaded(tokens)
    (tmp_path / "elsewhere").rename(moved)
    torch.testing.assert_close(loaded(tokens).logits, expected)
    loaded.retriever.close()


@pytest.mark.parametrize("on_retrieval_error", ["raise", "skip"])
def test_another_knowledge_base_in_its_place_is_refused(
    tmp_path, documents, tokenizer, embedder, other_embedding_folder, on_retrieval_error
):
    retriever = build(tmp_path / "kb.db", documents[:2], tokenizer, embedder)
    retriever.on_retrieval_error = on_retrieval_error
    pickled = pickle.dumps(retriever)
    retriever.close()
    shutil.rmtree(tmp_path / "kb.db")
    build(tmp_path / "kb.db", documents[:2], tokenizer, Embedder(other_embedding_folder, device="cpu")).close()
    twin = pickle.loads(pickled)
    with pytest.raises(IdentityMismatch, match="cosine"):
        twin.retrieve(QUERIES)
    twin.close()


@pytest.fixture
def connected(monkeypatch):
    """Replace connecting by a list that grows with the token of each attempt."""
    tokens = []

    def connect(self):
        tokens.append(self.address.secret())
        self.client, self._process = SimpleNamespace(list_collections=lambda timeout: []), os.getpid()

    monkeypatch.setattr(MilvusConnection, "_connect", connect)
    return tokens


@pytest.mark.parametrize(
    "uri, token", [("https://root:S3cret@host:19530/db", None), ("https://host:19530", "root:S3cret")]
)
def test_secrets_are_not_pickled(monkeypatch, connected, uri, token):
    monkeypatch.delenv("MILVUS_TOKEN", raising=False)
    connection = MilvusConnection(MilvusAddress(uri, token=token))
    assert copy.deepcopy(connection) is connection
    pickled = pickle.dumps(connection)
    assert b"S3cret" not in pickled and b"root" not in pickled
    twin = pickle.loads(pickled)
    with pytest.raises(KnowledgeBaseError, match="https://host:19530.* tokens are not pickled: set MILVUS_TOKEN"):
        twin.list_collections()
    monkeypatch.setenv("MILVUS_TOKEN", "root:other")
    assert twin.list_collections() == []
    assert connected == ["root:S3cret", "root:other"]


def test_a_milvus_lite_file_gets_no_token_in_another_process(tmp_path, monkeypatch, connected):
    """Milvus Lite has no tokens, but the program may have one for its server."""
    monkeypatch.setenv("MILVUS_TOKEN", "root:S3cret")
    pickled = pickle.dumps(MilvusConnection(tmp_path / "kb.db"))
    (tmp_path / "kb.db").mkdir()
    pickle.loads(pickled).list_collections()
    assert connected == [None, None]


def test_the_first_call_in_another_process_waits_for_the_server(monkeypatch, connected):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    twin = pickle.loads(pickle.dumps(MilvusConnection("http://host:1")))
    connect, failures = MilvusConnection._connect, iter(range(5))

    def away(self):
        if next(failures, None) is not None:
            raise KnowledgeBaseError("nothing answers")
        connect(self)

    monkeypatch.setattr(MilvusConnection, "_connect", away)
    assert twin.list_collections() == []


def test_a_forked_process_that_cannot_connect_gets_the_advice_to_spawn(monkeypatch, connected):
    def away(self):
        raise KnowledgeBaseError("nothing answers.")

    connection = MilvusConnection(MilvusAddress("http://host:1", timeout=0.01))
    connection._process = os.getppid()
    monkeypatch.setattr(MilvusConnection, "_connect", away)
    with pytest.raises(KnowledgeBaseError, match=r"nothing answers\. Tried for .* forked.*with 'spawn' instead"):
        connection.list_collections()


@pytest.mark.parametrize("start, workers", [("fork", 2), ("spawn", 1)])
def test_data_loader_workers_fetch_neighbors(retriever, start, workers):
    """This process has the file open and serves it to the workers."""
    sequences = [
        {"input_ids": query + query[::-1], "doc_ids": [[f"topic {number}"]] * 2} for number, query in enumerate(QUERIES)
    ]
    collate = RetroDataCollator(retriever)
    loader = torch.utils.data.DataLoader(
        sequences, batch_size=2, collate_fn=collate, num_workers=workers, multiprocessing_context=start, timeout=120
    )
    batches = list(loader)
    for number, batch in enumerate(batches):
        by_hand = collate(sequences[2 * number : 2 * number + 2])
        assert all(torch.equal(batch[name], by_hand[name]) for name in by_hand)
    assert len(batches) == 3 and retriever.store.connection.owns_file


def test_processes_of_datasets_fetch_neighbors(retriever, expected):
    rows = datasets.Dataset.from_dict({"chunk": QUERIES})
    found = rows.map(lambda row: {"ids": retriever.retrieve([row["chunk"]]).ids[0].tolist()}, num_proc=2)
    assert torch.equal(torch.tensor(found["ids"][:]), expected.ids)


def test_a_forked_process_leaves_the_file_to_its_parent(retriever, expected):
    """The child may close its retriever and stop all embedded servers of its process."""
    child = os.fork()
    if not child:
        result = 1
        try:
            from milvus_lite.server_manager import server_manager_instance

            retriever.close()
            server_manager_instance.release_all()
            result = 0
        finally:
            os._exit(result)
    assert os.waitpid(child, 0)[1] == 0
    same(pickle.loads(pickle.dumps(retriever)).retrieve(QUERIES), expected)  # nothing remembered
    assert (
        retriever.store.count() > 0
        and LiteFile("kb.db", retriever.store.connection.address.path).owner()["process"] == os.getpid()
    )


def test_a_pickled_tokenizer_gives_the_same_ids(tokenizer, documents):
    twin = pickle.loads(pickle.dumps(tokenizer))
    texts = [document.text for document in documents[:5]]
    assert (
        isinstance(twin, BulkTokenizer)
        and twin.uses_tiktoken
        and twin.encode_batch(texts) == tokenizer.encode_batch(texts)
    )


def test_a_copied_address_keeps_its_token():
    address = MilvusAddress("https://host:19530", token="root:S3cret")
    for twin in (copy.copy(address), copy.deepcopy(address), copy.deepcopy({"address": address})["address"]):
        assert twin.secret() == "root:S3cret" and twin == address
    assert "S3cret" not in repr(address)


def test_an_empty_token_is_no_token(monkeypatch):
    monkeypatch.setenv("MILVUS_TOKEN", "")
    address = MilvusAddress("http://host:19530")
    assert address.secret() is None and address.options() == {}
    assert pickle.loads(pickle.dumps(address)).secret() is None
