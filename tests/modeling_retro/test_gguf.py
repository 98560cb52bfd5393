"""GGUF files open as transformers opens them, and the model is saved like any other."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_retro import RetroForCausalLM

from ..support.decoders import SIZES, decoder_batch

WIDTH, INNER, LAYERS, HEADS, VOCABULARY = 32, 128, 2, 2, 61
POSITIONS = 1024  # of every GPT-2: transformers reads no other number


def write_gguf(path, architecture, tensors, **settings):
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([str(number) for number in range(VOCABULARY)])  # transformers counts them
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)
    draw = np.random.default_rng(0)
    for name, shape in tensors.items():
        writer.add_tensor(name, draw.normal(1.0 if "norm.weight" in name else 0.0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def llama(tmp_path):
    tensors = {"token_embd.weight": (VOCABULARY, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors[f"blk.{layer}.{name}.weight"] = (WIDTH, WIDTH)
        tensors |= {f"blk.{layer}.ffn_{name}.weight": (INNER, WIDTH) for name in ("gate", "up")}
        tensors |= {f"blk.{layer}.ffn_down.weight": (WIDTH, INNER)}
        tensors |= {f"blk.{layer}.{name}_norm.weight": (WIDTH,) for name in ("attn", "ffn")}
    settings = {"head_count_kv": HEADS, "layer_norm_rms_eps": 1e-5, "rope_dimension_count": WIDTH // HEADS}
    write_gguf(tmp_path / "llama.gguf", "llama", tensors, **settings)
    return tmp_path


@pytest.fixture
def gpt2(tmp_path):
    tensors = {"token_embd.weight": (VOCABULARY, WIDTH), "position_embd.weight": (POSITIONS, WIDTH)}
    tensors |= {f"output_norm.{part}": (WIDTH,) for part in ("weight", "bias")}
    sizes = {"attn_qkv": (3 * WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_up": (INNER, WIDTH)}
    sizes |= {"ffn_down": (WIDTH, INNER)}
    for layer in range(LAYERS):
        for name, shape in sizes.items():
            tensors |= {f"blk.{layer}.{name}.weight": shape, f"blk.{layer}.{name}.bias": shape[:1]}
        for name in ("attn_norm", "ffn_norm"):
            tensors |= {f"blk.{layer}.{name}.{part}": (WIDTH,) for part in ("weight", "bias")}
    write_gguf(tmp_path / "gpt2.gguf", "gpt2", tensors, layer_norm_eps=1e-5)
    return tmp_path


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_is_the_decoder_and_saves_without_help(name, request, tmp_path):
    folder = request.getfixturevalue(name)
    arguments = {"gguf_file": f"{name}.gguf", "dtype": torch.float32}
    decoder = AutoModelForCausalLM.from_pretrained(folder, **arguments).eval()
    model = RetroForCausalLM.from_pretrained(folder, **arguments, **SIZES, copy_head=True, cca_layers=[1])
    batch = decoder_batch()
    expected = decoder(batch["input_ids"]).logits
    assert torch.equal(model(**batch).logits, expected)
    model.save_pretrained(tmp_path / "saved")
    again = RetroForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(**batch).logits, expected)
    assert again.config.copy_head and not hasattr(again.config, "quantization_config")
