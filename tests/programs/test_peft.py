"""PEFT: low-rank adapters on the decoder, on the cross-attention, and new parts trained whole."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model

from modeling_retro import RetroForCausalLM

from ..modeling_retro.test_training_features import training_batch
from ..support.by_hand import PROMPTS, HashRetriever, greedy_by_hand, left_padded
from ..support.retro_models import VOCAB, small_model

# PEFT reads the name that transformers 5.24 renames
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ADAPTERS = {
    "decoder": {"target_modules": r".*\.h\.\d+\.attn\.c_attn"},
    "cross_attention": {"target_modules": r".*\.cca\.(q_attn|c_attn|c_proj)"},
    "every_projection": {"target_modules": "all-linear"},
    "encoder_whole": {"target_modules": ["q_attn"], "modules_to_save": ["encoder"]},
    "cross_attention_whole": {"target_modules": r".*\.attn\.c_attn", "modules_to_save": ["ln_cca", "cca"]},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_trains_alone_and_loads_to_the_same_logits(name, tmp_path):
    small_model().save_pretrained(tmp_path / "base")
    model = RetroForCausalLM.from_pretrained(tmp_path / "base")
    base = {key: weight.clone() for key, weight in model.state_dict().items()}
    batch = training_batch()
    model = get_peft_model(model.train(), LoraConfig(task_type="CAUSAL_LM", r=2, fan_in_fan_out=True, **ADAPTERS[name]))
    trained = {key: weight.clone() for key, weight in model.named_parameters() if weight.requires_grad}
    assert any("lora" in key for key in trained)
    assert any("modules_to_save" in key for key in trained) == ("modules_to_save" in ADAPTERS[name])

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for _ in range(4):
        torch.manual_seed(0)  # the same dropout, so that losses can be compared
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for key, weight in model.named_parameters():
        assert (key in trained) == (key in trained and not torch.equal(weight, trained[key])), key

    # without gradients: with gradients of its bias, SDPA uses another kernel with other last bits
    with torch.no_grad():
        model.eval().save_pretrained(tmp_path / "adapter")
        expected = model(**batch).logits
        fresh = RetroForCausalLM.from_pretrained(tmp_path / "base")
        loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
        assert torch.equal(loaded(**batch).logits, expected)
        by_name = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", retriever=HashRetriever())
        assert torch.equal(by_name(**batch).logits, expected)
        with by_name.disable_adapter():
            original = RetroForCausalLM.from_pretrained(tmp_path / "base")
            assert torch.equal(by_name(**batch).logits, original(**batch).logits)
        assert all(torch.equal(weight, base[key]) for key, weight in original.state_dict().items())

        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-4, rtol=1e-4)
        sequences = by_name.generate(**left_padded(PROMPTS), max_new_tokens=6, do_sample=False, pad_token_id=VOCAB - 1)
        for prompt, row in zip(PROMPTS, sequences.tolist(), strict=True):
            assert row[-6 - len(prompt) :] == greedy_by_hand(merged, prompt, 6)
