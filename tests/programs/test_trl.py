"""TRL trains a model with a retriever, and its reference models have the same retriever."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    SFTConfig,
    SFTTrainer,
)

from modeling_retro import RetroForCausalLM

from ..support.by_hand import HashRetriever
from ..support.retro_models import CHUNK

# TRL and PEFT use the names that transformers 5.24 renames
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")


def sft(model, texts, tokenizer, folder, peft_config=None, **settings):
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **({"gradient_checkpointing": False} | settings),
    )
    data = Dataset.from_dict({"text": texts})
    return SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)


WAYS = {
    "padded": {},
    "packed": {"packing": True, "packing_strategy": "wrapped", "max_length": 4 * CHUNK},
    "packed_by_best_fit": {"packing": True, "max_length": 8 * CHUNK},
    "checkpointed": {"gradient_checkpointing": True},
    "adapters": {"peft_config": LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)},
}


@pytest.mark.parametrize("way", WAYS)
def test_sft_trains_on_retrieved_neighbors(saved, texts, tokenizer, tmp_path, way):
    # SFTTrainer computes the loss from lm_head's weights itself: a copy head has no part in it
    model = AutoModelForCausalLM.from_pretrained(saved, retriever=HashRetriever(), copy_head=False)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trainer = sft(model, texts, tokenizer, tmp_path, **WAYS[way])
    calls = model.retriever.calls
    calls.clear()
    trainer.train()
    assert len(calls) == 4  # each step asks once, for the chunks of its batch
    if way != "packed":  # which cuts one stream of text; the other ways keep texts apart
        rows = [tokenizer.encode(text) + [tokenizer.eos_token_id] for text in texts]
        own = {tuple(row[start : start + CHUNK]) for row in rows for start in range(0, len(row), CHUNK)}
        assert {chunk for call in calls for chunk in call} <= own
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(losses) == 4 and all(map(math.isfinite, losses + norms))
    if way != "adapters":
        still = [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])]
        assert still == []  # the encoder and the cross-attention have learned, too
        trainer.save_model()
        loaded = RetroForCausalLM.from_pretrained(tmp_path)
        assert all(map(torch.equal, loaded.parameters(), model.cpu().parameters()))


PAIRS = {"per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1, "learning_rate": 0.0, "max_length": 40}
PLAIN = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True}


def first_log(trainer):
    trainer.train()
    return trainer.state.log_history[0]


@pytest.fixture
def policy(saved):
    return AutoModelForCausalLM.from_pretrained(saved, retriever=HashRetriever(), copy_head=False)


@pytest.fixture
def preferences(texts):
    answers = [text * 2 for text in texts]  # longer than a chunk
    return {"prompt": texts[:4], "chosen": answers[4:8], "rejected": answers[8:12]}


@pytest.mark.parametrize("way", ["opened by DPOTrainer", "given", "adapters"])
def test_the_reference_of_dpo_has_the_policys_retriever(policy, preferences, tokenizer, tmp_path, way):
    """Equal models have a first loss of ln 2."""
    reference = peft_config = None
    if way == "given":
        reference = AutoModelForCausalLM.from_pretrained(
            str(policy.config.name_or_path), retriever=HashRetriever(), copy_head=False
        )
    elif way == "adapters":
        peft_config = WAYS["adapters"]["peft_config"]
    arguments = DPOConfig(str(tmp_path), gradient_checkpointing=False, **PAIRS, **PLAIN)
    trainer = DPOTrainer(
        policy,
        reference,
        arguments,
        train_dataset=Dataset.from_dict(preferences),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    assert first_log(trainer)["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert policy.retriever.calls


def test_the_reference_of_kto_has_the_policys_retriever(policy, preferences, tokenizer, tmp_path):
    """Equal models have no divergence, and a first loss of 1/2."""
    data = {"prompt": preferences["prompt"], "completion": preferences["chosen"], "label": [True, False] * 2}
    arguments = KTOConfig(str(tmp_path), gradient_checkpointing=False, **PAIRS, **PLAIN)
    trainer = KTOTrainer(policy, args=arguments, train_dataset=Dataset.from_dict(data), processing_class=tokenizer)
    log = first_log(trainer)
    assert log["loss"] == pytest.approx(0.5, abs=1e-5) and log["kl"] == pytest.approx(0, abs=1e-5)
    assert trainer.ref_model.retriever is policy.retriever


def test_the_reference_of_grpo_has_the_policys_retriever(policy, preferences, tokenizer, tmp_path):
    arguments = GRPOConfig(
        str(tmp_path),
        gradient_checkpointing=False,
        beta=0.1,
        disable_dropout=True,
        num_generations=2,
        max_completion_length=2 * CHUNK,
        **{name: value for name, value in PAIRS.items() if name != "max_length"},
        **PLAIN,
    )
    trainer = GRPOTrainer(
        policy,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": preferences["prompt"]}),
        processing_class=tokenizer,
    )
    assert first_log(trainer)["kl"] == pytest.approx(0, abs=1e-5)
    assert trainer.ref_model.retriever is policy.retriever
