"""Models that are offloaded, sharded, quantized or on two devices give the same results."""

import copy

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin, cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from modeling_retro import RetroForCausalLM
from modeling_retro.neighbor_encoder import UnencodedNeighbors

from ..support.by_hand import PROMPTS, HashRetriever, greedy_by_hand, left_padded, retrieving_model
from ..support.retro_models import VOCAB, small_model
from .test_training_features import gradients, training_batch, without_dropout


def _map(**places):
    """Return a device map with all modules on the CPU, except for the named ones."""
    names = ["wte", "wpe", "drop", "h.0", "h.1", "h.2", "h.3", "ln_f"]
    names += [f"encoder.{name}" for name in ("wpe", "drop", "layers.0", "layers.1", "ln_f")]
    return {"lm_head": "cpu", "copy_head": places.get("copy_head", "cpu")} | {
        f"transformer.{name}": places.get(name.replace(".", "_"), "cpu") for name in names
    }


@pytest.mark.parametrize(
    "placement",
    [
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"device_map": _map(h_1="disk", h_2="disk", encoder_layers_0="disk")},
        {
            "device_map": _map(
                copy_head="disk", h_0="disk", h_3="disk", ln_f="disk", encoder_wpe="disk", encoder_ln_f="disk"
            )
        },
        {"device_map": "auto", "max_memory": {"cpu": 30_000}},  # bytes: about half of the model
    ],
    ids=["auto", "cpu", "layers_on_disk", "more_on_disk", "auto_with_little_memory"],
)
def test_a_model_placed_by_a_device_map_is_the_same_model(placement, tmp_path):
    model = retrieving_model()
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    placed = RetroForCausalLM.from_pretrained(
        tmp_path / "model",
        retriever=HashRetriever(),
        attn_implementation="eager",
        offload_folder=tmp_path / "offload",
        **placement,
    )
    has_disk = "disk" in getattr(placed, "hf_device_map", {}).values()
    assert has_disk == any(parameter.is_meta for parameter in placed.parameters())
    _assert_same_model(placed, model)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_model_is_the_same_model(where, tmp_path):
    model = retrieving_model()
    offloaded, device = copy.deepcopy(model), torch.device("cpu")
    if where == "cpu":
        cpu_offload(offloaded, execution_device=device)
    else:
        disk_offload(offloaded, str(tmp_path), execution_device=device)
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    _assert_same_model(offloaded, model)


@pytest.mark.parametrize(
    "second", [["h.2", "h.3", "ln_f"], ["h.1", "h.3"], ["encoder."], ["encoder.layers.1", "encoder.wpe"]], ids=str
)
@torch.no_grad()
def test_a_model_on_two_devices_moves_everything_that_its_layers_share(second, monkeypatch):
    """Fake tensors stand for two devices: mixing them is an error, as on two GPUs.

    They have no values, so which neighbors are missing is made up.
    """

    def real(neighbors):
        mask = neighbors.attention_mask
        return torch.arange(1, mask[..., 0].numel(), device=mask.device), mask.shape[-1]

    monkeypatch.setattr(UnencodedNeighbors, "_real", real)

    def device(name):
        return f"cpu:{int(name.removeprefix('transformer.').startswith(tuple(second)))}"

    model, batch = small_model(), training_batch()
    units = {name: module for name, module in model.named_modules() if not list(module.children())}
    units |= {n: m for n, m in model.named_modules() if type(m).__name__ in model._no_split_modules}
    units["transformer.encoder"] = model.transformer.encoder
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, module in model.named_modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                place = torch.empty(parameter.shape, device=device(name))
                setattr(module, key, torch.nn.Parameter(place, requires_grad=False))
        for name, module in units.items():
            if not any(name.startswith(f"{other}.") for other in units if other != "transformer.encoder"):
                hook = AlignDevicesHook(device(name), skip_keys=model._skip_keys_device_placement)
                add_hook_to_module(module, hook)
        inputs = {name: torch.empty_like(value, device="cpu:0") for name, value in batch.items()}
        output = model(**inputs, use_cache=False)
    assert output.logits.shape == (*batch["input_ids"].shape, VOCAB)


@torch.no_grad()
def _assert_same_model(placed, model):
    batch = training_batch()
    assert torch.equal(placed(**batch).logits, model(**batch).logits)
    sequences = placed.generate(**left_padded(PROMPTS), max_new_tokens=6, do_sample=False, pad_token_id=VOCAB - 1)
    for prompt, row in zip(PROMPTS, sequences.tolist(), strict=True):
        assert row[-6 - len(prompt) :] == greedy_by_hand(model, prompt, 6)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """A process group of this process alone."""
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_fsdp_shards_by_layer_of_decoder_and_encoder_with_the_same_gradients(mesh):
    model = without_dropout()
    batch = training_batch()
    expected = gradients(model, batch)
    sharded = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    assert len(sharded) == model.config.n_layer + model.config.encoder_num_layers
    for module in sharded:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss, found = gradients(model, batch)
    assert torch.equal(loss, expected[0])
    torch.testing.assert_close({name: gradient.full_tensor() for name, gradient in found.items()}, expected[1])


def test_accelerates_wrap_policy_finds_the_layers_by_itself(mesh):
    model = without_dropout()
    batch = training_batch()
    expected = gradients(model, batch)
    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False)
    plugin.set_auto_wrap_policy(model)
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=plugin.auto_wrap_policy, device_id=torch.device("cpu"), use_orig_params=True
    )
    units = sum(isinstance(module, FullyShardedDataParallel) for module in wrapped.modules())
    assert units == 1 + model.config.n_layer + model.config.encoder_num_layers
    loss, found = gradients(wrapped, batch)
    assert torch.equal(loss, expected[0])
    found = {name.replace("_fsdp_wrapped_module.", ""): gradient for name, gradient in found.items()}
    torch.testing.assert_close(found, expected[1])


def dequantized(module):
    if isinstance(module, Linear4bit):
        return dequantize_4bit(module.weight, module.weight.quant_state)
    # the first forward moves the scales
    scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
    return int8_vectorwise_dequant(module.weight.data, scales)


@pytest.mark.parametrize(
    ("settings", "kind", "error"),
    [
        ({"load_in_4bit": True}, Linear4bit, 0.03),  # multiplies in half precision
        ({"load_in_8bit": True}, Linear8bitLt, 0.05),  # quantizes the activations as well
    ],
    ids=["4bit", "8bit"],
)
@torch.no_grad()
def test_a_quantized_model_computes_with_its_quantized_weights_and_saves_them(settings, kind, error, tmp_path):
    retrieving_model(n_embd=64, initializer_range=0.1).save_pretrained(tmp_path)
    plain = RetroForCausalLM.from_pretrained(tmp_path).eval()
    batch = training_batch()
    quantized = RetroForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**settings))
    modules = dict(plain.named_modules())
    names = [name for name, module in quantized.named_modules() if isinstance(module, kind)]
    assert names == [name for name, module in plain.named_modules() if isinstance(module, Conv1D)]
    for name in names:
        modules[name].weight.copy_(dequantized(quantized.get_submodule(name)).T)
    expected = plain(**batch).logits
    distance = (quantized(**batch).logits.float() - expected).norm() / expected.norm()
    assert distance < error
    quantized.save_pretrained(tmp_path / "quantized")
    opened = RetroForCausalLM.from_pretrained(tmp_path / "quantized")
    assert torch.equal(opened(**batch).logits, quantized(**batch).logits)
    opened.save_pretrained(tmp_path / "again")
    quantized.set_retriever(HashRetriever())
    assert quantized.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=6, do_sample=False).shape[1] > len(PROMPTS[0])
    assert quantized.retriever.calls
