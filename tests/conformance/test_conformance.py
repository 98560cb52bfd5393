"""transformers' own tests of a model, run on RETRO with and without neighbors."""

import unittest

import torch

from modeling_retro import RetroConfig, RetroForCausalLM, RetroModel

from ..support.library_tests import common, configuration, fsdp, tensor_parallel, training


class RetroModelTester:
    """A small configuration and inputs, in the shape that transformers' tests ask for."""

    config_class = RetroConfig
    base_model_class = RetroModel
    causal_lm_class = RetroForCausalLM

    batch_size, seq_length, vocab_size, hidden_size = 3, 12, 99, 32
    num_hidden_layers, num_attention_heads, is_training, pad_token_id = 2, 4, True, 98
    chunk_size, num_neighbors, neighbor_length = 4, 2, 8

    def __init__(self, with_neighbors: bool):
        self.with_neighbors = with_neighbors

    def get_config(self) -> RetroConfig:
        return RetroConfig(
            vocab_size=self.vocab_size,
            n_positions=128,
            n_embd=self.hidden_size,
            n_layer=self.num_hidden_layers,
            n_head=self.num_attention_heads,
            chunk_size=self.chunk_size,
            num_neighbors=self.num_neighbors,
            neighbor_length=self.neighbor_length,
            cca_layers=[1],
            copy_head=True,
            cca_match=True,
            bos_token_id=97,
            eos_token_id=97,
            pad_token_id=self.pad_token_id,
        )

    def prepare_config_and_inputs_for_common(self):
        tokens = (self.batch_size, self.seq_length)
        inputs = {
            "input_ids": torch.randint(0, self.pad_token_id, tokens),
            "attention_mask": torch.ones(tokens, dtype=torch.long),
        }
        if self.with_neighbors:
            chunks = self.seq_length // self.chunk_size
            shape = (self.batch_size, chunks, self.num_neighbors, self.neighbor_length)
            # tests of smaller vocabularies cut down input_ids, but not these
            inputs["neighbor_ids"] = torch.randint(0, self.vocab_size // 2, shape)
            inputs["neighbor_attention_mask"] = torch.ones(shape, dtype=torch.long)
        return self.get_config(), inputs


class Conformance(
    common.ModelTesterMixin,
    common.GenerationTesterMixin,  # empty in source distributions without it; see tests/modeling_retro
    training.TrainingTesterMixin,
    tensor_parallel.TensorParallelTesterMixin,
    fsdp.FSDPTesterMixin,
):
    all_model_classes = (RetroModel, RetroForCausalLM)
    with_neighbors: bool

    def setUp(self):
        self.model_tester = RetroModelTester(self.with_neighbors)
        self.config_tester = configuration.ConfigTester(self, config_class=RetroConfig, n_embd=37)

    def test_config(self):
        self.config_tester.run_common_tests()


class RetroWithNeighborsTest(Conformance, unittest.TestCase):
    with_neighbors = True


class RetroWithoutNeighborsTest(Conformance, unittest.TestCase):
    with_neighbors = False
    test_all_params_have_gradient = False  # RETRO's parts have no neighbors
