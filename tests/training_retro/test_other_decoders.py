"""A Llama with a sentencepiece-like tokenizer is trained and sampled by the same settings."""

import json
import pydoc_data.topics

import pytest
import torch
from datasets import load_dataset
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import generate_hf
import train_hf
import training_retro
from evaluation_retro.multiple_choice import LikelihoodChoice
from modeling_retro import RetroForCausalLM
from retrieval import BulkTokenizer
from retrieval.cli import main as knowledge_base_program
from training_retro.flops import step_flops
from training_retro.parameters import count_parameters
from training_retro.sampling import GenerateArguments, load
from training_retro.settings import DEFAULT_BLOCK_SIZE

from ..support.runs import flags
from ..support.small_models import save_static_embedding, train_llama_tokenizer
from ..support.training_world import CHUNK


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a random Llama with room for 131072 tokens, and its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = train_llama_tokenizer(list(pydoc_data.topics.topics.values())[:20], 600)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=640, max_position_embeddings=131072, **sizes, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(world, llama, tmp_path_factory):
    """The flags that name a knowledge base of the training texts in the Llama's tokens."""
    root = tmp_path_factory.mktemp("llama-kb")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)
    save_static_embedding(tokenizer, root / "embedding", dim=32, seed=0)
    where = {"--uri": root / "kb.db", "--collection": "texts", "--tokenizer": llama, "--chunk-size": CHUNK}
    words = [str(word) for pair in where.items() for word in pair]
    knowledge_base_program(["ingest", str(world / "train"), *words, "--embedding-model", str(root / "embedding")])
    return {"knowledge_base": root / "kb.db", "collection_name": "texts", "embedding_model": root / "embedding"}


def llama_flags(world, llama, folder, **changes):
    settings = {"tokenizer_name": None, "model_name_or_path": llama, "config_overrides": f"{{chunk_size: {CHUNK}}}"}
    return flags(world, None, folder, **settings | {"block_size": 64} | changes)


def test_a_llama_is_trained_measured_and_sampled(world, llama, texts, tmp_path, capsys):
    arguments = llama_flags(world, llama, tmp_path / "run", max_steps=12, learning_rate="2e-2", **texts)
    train_hf.main(arguments)
    capsys.readouterr()
    model, decoder = RetroForCausalLM.from_pretrained(tmp_path / "run"), LlamaForCausalLM.from_pretrained(llama)
    assert model.config.copy_head and model.config.num_neighbors == 4
    kept = model.transformer.decoder.state_dict()
    assert all(torch.equal(weight, kept[name]) for name, weight in decoder.state_dict().items())
    numbers = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert numbers["eval_bits_per_byte"] < numbers["eval_off_bits_per_byte"]
    assert set(range(600, 640)) <= set(model.generation_config.suppress_tokens)

    model.save_reader(tmp_path / "reader")
    put_on, _ = load(GenerateArguments(model=str(llama), reader=str(tmp_path / "reader"), device="cpu"))
    assert all(map(torch.equal, put_on.parameters(), model.parameters()))

    changes = {"model_name_or_path": tmp_path / "run", "train_data": None, "max_steps": None, "eval_only": "true"}
    train_hf.main(llama_flags(world, llama, tmp_path / "measured", **changes, config_overrides=None, **texts))
    again = json.loads((tmp_path / "measured" / "eval_results.json").read_text())
    assert again["eval_bits_per_byte"] == pytest.approx(numbers["eval_bits_per_byte"], rel=1e-6)

    capsys.readouterr()
    base = [word for name, value in texts.items() for word in (f"--{name}", str(value))]
    prompt = "The try statement specifies exception handlers and naïve code"
    generate_hf.main(["--model", str(tmp_path / "run"), "--prompt", prompt, "--max_new_tokens", "9", *base])
    printed = capsys.readouterr().out
    assert f"\n{prompt}" in printed and ".txt, chunk " in printed


def built(arguments, cache_dir):
    trainer = training_retro.build_trainer(*training_retro.parse_arguments(arguments), cache_dir)
    if trainer.retro.retriever is not None:
        trainer.retro.retriever.close()
    return trainer


SCRATCH = "{text_config: {model_type: llama, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 4}}"


@pytest.mark.parametrize(
    "settings, trained",
    [
        ({}, {"copy head"}),
        ({"freeze_backbone": "false"}, {"decoder", "copy head"}),
        ({"knowledge_base": None}, {"decoder"}),
        ({"lora": "{r: 2, target_modules: [q_proj]}"}, {"copy head", "LoRA adapters"}),
        ({"model_name_or_path": None, "config_overrides": SCRATCH}, {"decoder", "copy head"}),
    ],
    ids=["default", "all", "no_neighbors", "lora", "scratch"],
)
def test_pretrained_decoders_are_frozen_by_default(world, llama, texts, tmp_path, settings, trained):
    overrides = {"config_overrides": f"{{chunk_size: {CHUNK}}}"}
    if "config_overrides" in settings:
        settings = settings | {"tokenizer_name": llama}
        overrides = {"config_overrides": SCRATCH.replace("}}", f"}}, chunk_size: {CHUNK}}}")}
    trainer = built(llama_flags(world, llama, tmp_path, **texts | settings | overrides), tmp_path / "c")
    counts = count_parameters(trainer.model)
    assert {part for part, (_, own) in counts.items() if own} == trained
    if "lora" in settings:
        assert not trainer.model.peft_config["default"].fan_in_fan_out


def test_a_bare_flag_freezes(world, llama, tmp_path):
    model, _, _ = training_retro.parse_arguments(
        [*llama_flags(world, llama, tmp_path, knowledge_base="kb.db"), "--freeze_backbone"]
    )
    assert model.freeze_backbone is True


def test_sequences_are_short_by_default_and_begin_as_texts_do(world, llama, tmp_path):
    (tmp_path / "long").mkdir()
    (tmp_path / "long" / "all.txt").write_text("".join(list(pydoc_data.topics.topics.values())[:3])[:20_000])
    changes = {"train_data": tmp_path / "long", "validation_data": None, "block_size": None}
    trainer = built(llama_flags(world, llama, tmp_path / "run", **changes), tmp_path / "c")
    rows = trainer.train_dataset["input_ids"]
    assert len(rows) > 1 and {len(row) for row in rows[:-1]} == {DEFAULT_BLOCK_SIZE}
    assert {row[0] for row in rows} == {1}
    tokenizer = BulkTokenizer(PreTrainedTokenizerFast.from_pretrained(llama))
    joined = [token for row in rows for token in row[1:]]
    assert tokenizer.decode(joined[:-1]) == (tmp_path / "long" / "all.txt").read_text() and joined[-1] == 2


def test_flops_of_a_llama(llama):
    """A token costs 4 or 6 for each weight that multiplies states; embeddings cost nothing."""
    model = RetroForCausalLM.from_pretrained(llama)
    model.freeze_backbone()
    layer = 4 * 32 * 32 + 3 * 32 * 64
    tokens = 2 * 10
    scores = 12 * 2 * 32 * tokens * 10 / 2
    found = step_flops(model, {"input_ids": torch.zeros(2, 10, dtype=torch.long)})
    head = sum(p.numel() for p in model.copy_head.parameters() if p.ndim == 2)
    assert found == pytest.approx(tokens * (4 * (2 * layer + 640 * 32) + 6 * head) + scores)


def test_an_answer_is_scored_as_the_continuation_of_its_question(llama):
    model = RetroForCausalLM.from_pretrained(llama).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)
    choice = LikelihoodChoice(model, BulkTokenizer(tokenizer), "likelihood", 8, {"use_retrieval": False})
    question, answer = "The try statement", " specifies exception handlers"
    ids = torch.tensor([tokenizer(question + answer)["input_ids"]])
    begin = len(tokenizer(question)["input_ids"])
    with torch.no_grad():
        log_probs = model(ids, use_retrieval=False).logits[0].log_softmax(-1)
    expected = sum(log_probs[place - 1, ids[0, place]].item() for place in range(begin, ids.shape[1]))
    assert choice.log_likelihoods([(question, answer)]) == [pytest.approx(expected, abs=1e-4)]


def test_the_exported_texts_of_chunks_join_to_their_documents(world, llama, texts, tmp_path):
    where = ["--uri", str(texts["knowledge_base"]), "--collection", "texts", "--tokenizer", str(llama)]
    knowledge_base_program(["export", str(tmp_path / "shared"), *where])
    rows = load_dataset("parquet", data_files=str(tmp_path / "shared" / "data" / "*.parquet"), split="train")
    exported = {}
    for row in sorted(rows, key=lambda row: row["chunk_index"]):
        exported[row["doc_id"]] = exported.get(row["doc_id"], "") + row["text"]
    for name, joined in exported.items():
        assert joined == (world / name).read_text(encoding="utf-8")


def test_special_tokens_that_the_model_lacks_do_no_harm(world, llama, tmp_path):
    """Some decoders of text share a tokenizer with models that read images, too."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)
    tokenizer.add_tokens([AddedToken(f"<image {number}>", special=True) for number in range(100)])
    tokenizer.save_pretrained(tmp_path / "more")
    assert len(tokenizer) > 640
    trainer = built(llama_flags(world, llama, tmp_path / "run", tokenizer_name=tmp_path / "more"), tmp_path / "c")
    assert max(max(row) for row in trainer.train_dataset["input_ids"]) < 600
    tokenizer.add_tokens(["try", "the"])
    tokenizer.save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match="The tokenizer has 702 tokens, the model's vocabulary 640"):
        built(llama_flags(world, llama, tmp_path / "run", tokenizer_name=tmp_path / "words"), tmp_path / "c")
