"""TRL's SFTTrainer trains a model that reads: padded and packed text, adapters, checkpointed gradients."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from modeling_retro import RetroForCausalLM

from ..modeling.by_hand import HashRetriever
from ..modeling.conftest import CHUNK

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
    if way != "packed":  # cut from one stream of text; all else keeps each text to itself
        rows = [tokenizer.encode(text) + [tokenizer.eos_token_id] for text in texts]
        own = {tuple(row[start : start + CHUNK]) for row in rows for start in range(0, len(row), CHUNK)}
        assert {chunk for call in calls for chunk in call} <= own
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(losses) == 4 and all(map(math.isfinite, losses + norms))
    if way != "adapters":
        still = [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])]
        assert still == []  # the encoder and the cross-attention have learnt too
        trainer.save_model()
        loaded = RetroForCausalLM.from_pretrained(tmp_path)
        assert all(map(torch.equal, loaded.parameters(), model.cpu().parameters()))
