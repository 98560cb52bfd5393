"""The copy baseline equals a slow search, and its weight is the best one on training data."""

import json
import math

import pytest
import torch

import train_hf
from data_retro.collator import RetroDataCollator
from data_retro.packing import pack
from evaluation_retro import best_weight, byte_lengths, evaluate, weight_nats
from evaluation_retro.copy_baseline import WEIGHTS, copied_probability, mixture_nats
from modeling_retro import RetroForCausalLM

from ..support.runs import flags, knowledge_base, losses, train
from ..support.training_world import CHUNK


def look_up(tokens, i, neighbors):
    """List the tokens that follow tokens[i - 1], tokens[i] in the neighbors, or else tokens[i]."""
    for context in (tokens[i - 1 : i + 1], tokens[i : i + 1]):
        n = len(context)
        found = [
            neighbor[j + n]
            for neighbor in neighbors
            for j in range(len(neighbor) - n)
            if neighbor[j : j + n] == context
        ]
        if found and (n == 1 or i > 0):
            return found
    return []


@pytest.mark.parametrize(
    ("first_points", "stride"), [(None, None), ([8, 8, 8], 8), ([1, 7, 15], 8), ([1, 4, 10], 3), ([2, 8, 5], 1)]
)
def test_the_copier_equals_a_slow_search(first_points, stride):
    torch.manual_seed(0)
    length, slots = 4 * CHUNK + 3, 35
    tokens = torch.randint(0, 5, (3, length))  # a small vocabulary, so that tokens recur
    ids = torch.randint(0, 5, (3, slots, 2, 12))
    mask = torch.arange(12) < torch.randint(0, 13, (3, slots, 2, 1))
    given = None if first_points is None else torch.tensor(first_points)
    copied, found = copied_probability(tokens, ids, mask, CHUNK, given, stride)
    for row in range(3):
        points = [*range(CHUNK if given is None else first_points[row], length + 1, stride or CHUNK)]
        for i in range(length - 1):
            reached, expected = [slot for slot, point in enumerate(points) if point <= i + 1], []
            if reached:
                neighbors = [ids[row, reached[-1], k][mask[row, reached[-1], k]].tolist() for k in range(2)]
                expected = look_up(tokens[row].tolist(), i, neighbors)
            assert bool(found[row, i]) == bool(expected)
            share = expected.count(int(tokens[row, i + 1])) / len(expected) if expected else 0
            assert float(copied[row, i]) == pytest.approx(share)


def test_the_weight_is_the_best_on_its_data(config, tokenizer, retriever, texts):
    documents = [(str(n), tokenizer(text)["input_ids"]) for n, text in enumerate(texts)]
    batches = [RetroDataCollator(retriever)(list(pack(documents, 44, CHUNK, tokenizer.eos_token_id)))]
    # the retriever's tokens are shifted by one: undo it, so that the neighbors hold the text
    batches[0]["neighbor_ids"] = (batches[0]["neighbor_ids"] - 1) % len(tokenizer)
    model = RetroForCausalLM(config).train()
    weight = best_weight(weight_nats(model, batches, CHUNK, torch.device("cpu")))
    assert model.training and 0 < weight < 1
    losses = [evaluate(model, batches, byte_lengths(tokenizer), w).loss("copy_baseline") for w in WEIGHTS.tolist()]
    assert weight == pytest.approx(float(WEIGHTS[losses.index(min(losses))]))
    off = evaluate(model, batches, byte_lengths(tokenizer), 0.0)
    assert off.loss("copy_baseline") == pytest.approx(off.loss("off"))
    assert best_weight(weight_nats(model, [], CHUNK, torch.device("cpu"))) is None


def test_mixture_nats_are_those_of_mixed_probabilities():
    nats, copied = torch.rand(50, dtype=torch.float64) * 30, torch.rand(50, dtype=torch.float64)
    copied[:10] = 0
    found = torch.rand(50) < 0.8
    for weight in (0.0, 0.3, 0.98):
        expected = torch.where(found, -((1 - weight) * (-nats).exp() + weight * copied).log(), nats)
        torch.testing.assert_close(mixture_nats(nats.float(), copied.float(), found, weight), expected.float())


def test_nothing_is_copied_without_a_complete_chunk():
    none = torch.zeros(2, 0, 2, 12, dtype=torch.long)
    copied, found = copied_probability(torch.ones(2, 5, dtype=torch.long), none, none.bool(), CHUNK)
    assert copied.shape == found.shape == (2, 4) and not copied.any() and not found.any()


def test_training_logs_the_baseline_while_a_copy_head_learns(world, tokenizer_folder, tmp_path):
    overrides = "{n_layer: 2, n_embd: 32, n_head: 2, n_positions: 64, chunk_size: 8, cca_layers: [1], copy_head: true}"
    settings = {"max_steps": 12, "config_overrides": overrides, **knowledge_base(world)}
    train_hf.main(flags(world, tokenizer_folder, tmp_path / "run", **settings))
    metrics = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    for name in ("bits_per_byte", "off_bits_per_byte", "shuffled_bits_per_byte", "copy_baseline_bits_per_byte"):
        assert math.isfinite(metrics[f"eval_{name}"])
    assert "eval_gain_over_copy_baseline_stderr" in metrics
    assert float(RetroForCausalLM.from_pretrained(tmp_path / "run").copy_head.gate_scale.detach()) > 0


def test_weight_decay_spares_vectors_of_the_copy_head(world, tokenizer_folder, tmp_path):
    overrides = "{n_layer: 1, n_embd: 32, n_head: 2, n_positions: 64, chunk_size: 8, copy_head: true, cca_match: true}"
    arguments = flags(world, tokenizer_folder, tmp_path / "run", config_overrides=overrides, max_steps=1)
    trainer = train(arguments, tmp_path / "cache")
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    for name, parameter in trainer.model.named_parameters():
        assert (name in decayed) == (parameter.ndim > 1 and not name.endswith("cca.match")), name


def test_batches_of_one_are_refused_only_if_neighbors_are_shuffled(world, tokenizer_folder, tmp_path):
    overrides = "{n_layer: 1, n_embd: 32, n_head: 2, n_positions: 64, chunk_size: 8, cca_layers: [], copy_head: true}"
    settings = {"config_overrides": overrides, "max_steps": 1, "per_device_train_batch_size": 1}
    arguments = flags(world, tokenizer_folder, tmp_path / "run", **settings)
    assert len(losses(train(arguments, tmp_path / "cache"))) == 1
    place = [word for name, value in knowledge_base(world).items() for word in (f"--{name}", str(value))]
    with pytest.raises(SystemExit, match="Set the batch size to 2 or more, or neighbor_shuffle to 0"):
        train_hf.main([*arguments, *place])
    train_hf.main([*arguments, *place, "--precompute_to", str(tmp_path / "neighbors")])
    without_text = {"train_data": None, "validation_data": None, "precomputed": tmp_path / "neighbors"}
    stored = flags(world, tokenizer_folder, tmp_path / "run", **settings, **without_text)
    with pytest.raises(SystemExit, match="Set the batch size to 2 or more"):
        train_hf.main(stored)
