"""The comparison's materials: texts split by document, a knowledge base, and trained copy heads."""

from importlib import import_module

import comparison
import pytest
import torch

from evaluation_retro.cli import COMMANDS
from modeling_retro import RetroForCausalLM
from retrieval import load_tokenizer
from retrieval.parsing import parse_settings

from ..support.small_models import save_static_embedding
from .conftest import SIZE


def texts_below(folder):
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def folder(tmp_path, documents, tokenizer):
    comparison.write_texts(tmp_path, lambda: documents, tokenizer, SIZE)
    return tmp_path


def test_texts_are_whole_and_split_by_document(folder, documents, tokenizer):
    knowledge, held_out = texts_below(folder / "knowledge"), texts_below(folder / "held_out")
    assert len(held_out) == SIZE.held_out and not knowledge.keys() & held_out.keys()
    assert (knowledge | held_out).items() <= {document.id: document.text for document in documents}.items()
    comparison.write_texts(folder, lambda: pytest.fail("the texts are there"), tokenizer, SIZE)


def test_the_copy_heads_are_saved_as_a_user_opens_them(folder, decoder, hf_tokenizer, tokenizer, monkeypatch):
    monkeypatch.setattr(comparison, "MINILM", save_static_embedding(hf_tokenizer, folder / "static", dim=16, seed=0))
    monkeypatch.setattr(comparison, "WINDOW", SIZE.length)
    decoder.save_pretrained(folder / "decoder")
    model = RetroForCausalLM.from_pretrained(folder / "decoder", chunk_size=8, num_neighbors=4).eval()
    comparison.make_materials(folder, model, tokenizer, steps=3, seeds=2)

    retro = RetroForCausalLM.from_pretrained(folder / "retro")
    other = RetroForCausalLM.from_pretrained(folder / "decoder", reader=folder / "reader_1")
    assert retro.config.num_neighbors == 4 and retro.config.collection_name == comparison.COLLECTION
    assert load_tokenizer(folder / "retro").get_vocab() == hf_tokenizer.get_vocab()
    for name, weight in retro.transformer.decoder.state_dict().items():
        torch.testing.assert_close(weight, model.transformer.decoder.state_dict()[name], rtol=0, atol=0)
    heads = [its.copy_head.state_dict() for its in (retro, other)]
    assert any(not torch.equal(heads[0][name], heads[1][name]) for name in heads[0])

    before = (folder / "retro" / "model.safetensors").stat().st_mtime_ns
    comparison.make_materials(folder, model, tokenizer, steps=3, seeds=2)
    assert (folder / "retro" / "model.safetensors").stat().st_mtime_ns == before


def test_training_windows_do_not_read_their_own_documents(folder, tokenizer, hf_tokenizer, monkeypatch):
    monkeypatch.setattr(comparison, "MINILM", save_static_embedding(hf_tokenizer, folder / "static", dim=16, seed=0))
    retriever = comparison.open_knowledge_base(folder, tokenizer, 8)
    try:
        settings = comparison.TextSettings(texts=[str(folder / "knowledge")], window=SIZE.length)
        windows = comparison.draw_windows(settings.documents(), tokenizer, settings)
        found = comparison.find(retriever, windows)
    finally:
        retriever.close()
    assert {*found.doc_ids.flatten()} - {""} <= {f"knowledge/{name}" for name in texts_below(folder / "knowledge")}
    for doc_id, neighbors in zip(windows.doc_ids, found.doc_ids, strict=True):
        assert doc_id not in neighbors


def test_the_printed_commands_are_understood(tmp_path):
    outputs = set()
    for corpus in comparison.CORPORA:
        for program, command, *arguments in comparison.commands(tmp_path / corpus):
            kind = import_module(COMMANDS[command]).SETTINGS
            (settings,) = parse_settings((kind,), f"{program} {command}", arguments, lambda settings: None)
            outputs.add(settings.output_dir)
    assert len(outputs) == 4 * 3 + 2
