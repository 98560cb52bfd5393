"""Bits per byte equal a computation by hand, and the shuffle moves neighbors between sequences."""

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data_retro.collator import RetroDataCollator
from data_retro.packing import pack
from evaluation_retro import Evaluation, byte_lengths, evaluate, paired_gain, shuffle_neighbors
from modeling_retro import RetroForCausalLM

CHUNK = 8


def trained_model(config):
    """Return a model whose cross-attention is no longer the no-op of a fresh model."""
    torch.manual_seed(0)
    model = RetroForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "cca.c_proj" in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture
def rows(tokenizer, texts):
    documents = [(str(n), tokenizer(text)["input_ids"]) for n, text in enumerate(texts)]
    return list(pack(documents, 44, CHUNK, tokenizer.eos_token_id))


def test_byte_lengths_add_up_to_the_text(tokenizer, texts):
    lengths = byte_lengths(tokenizer)
    for text in texts:
        assert lengths[tokenizer(text)["input_ids"]].sum() == len(text.encode())
    assert lengths[tokenizer.eos_token_id] == 0


def test_byte_lengths_without_a_byte_level_tokenizer():
    text = "a chunk reads a neighbor naïvely, then the next chunk reads another"
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words.train_from_iterator([text], trainers.BpeTrainer(vocab_size=60, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    counted = byte_lengths(tokenizer)[tokenizer(text)["input_ids"]].sum()
    assert counted == len(text.encode()) + 1  # this tokenizer puts a space before the text


def test_evaluate_equals_a_computation_by_hand(config, tokenizer, retriever, rows):
    model = trained_model(config)
    collate = RetroDataCollator(retriever)
    measured = evaluate(model, [collate(rows[:2]), collate(rows[2:])], byte_lengths(tokenizer))

    for condition, kwargs in (("on", {}), ("off", {"use_retrieval": False})):
        for in_reach in (False, True):
            nats = tokens = text_bytes = 0
            for row in rows:
                logits = model(**collate([row]), **kwargs).logits[0]
                for position, target in enumerate(row["input_ids"][1:]):
                    if in_reach and position < CHUNK - 1:
                        continue
                    nats -= logits[position].log_softmax(-1)[target].item()
                    tokens += 1
                    if target != tokenizer.eos_token_id:
                        text_bytes += len(tokenizer.convert_ids_to_tokens(target))
            assert measured.loss(condition, in_reach) == pytest.approx(nats / tokens, rel=1e-5)
            expected = nats / math.log(2) / text_bytes
            assert measured.bits_per_byte(condition, in_reach) == pytest.approx(expected, rel=1e-5)
    # conditions differ, but not before the first chunk is complete
    numbers = measured.metrics()
    assert len({numbers["loss"], numbers["off_loss"], numbers["shuffled_loss"]}) == 3
    before = measured.nats[:, :, 0] - measured.nats[:, :, 1]
    np.testing.assert_allclose(before, before[:, :1].repeat(3, 1), rtol=1e-5)
    assert not any("copy_baseline" in name for name in numbers)  # no weight was given


@pytest.mark.parametrize("stride", [CHUNK, 3])
def test_first_points_of_their_own_are_measured_as_row_by_row(config, tokenizer, retriever, rows, stride):
    config.retrieval_stride = stride
    model = trained_model(config)
    collate = RetroDataCollator(retriever, stride)
    rows = [row | {"first_point": first_point} for row, first_point in zip(rows, [2, 8, 10, 7], strict=False)]
    measured = evaluate(model, [collate(rows)], byte_lengths(tokenizer))
    alone = [evaluate(model, [collate([row])], byte_lengths(tokenizer)) for row in rows]
    for condition in (0, 1):  # on, off
        np.testing.assert_allclose(
            measured.nats[:, condition], np.concatenate([one.nats[:, condition] for one in alone]), rtol=1e-4
        )
    predicted = [len(row["input_ids"]) - 1 for row in rows]
    in_reach = [count + 1 - row["first_point"] for count, row in zip(predicted, rows, strict=True)]
    assert measured.sizes[:, :, 0].tolist() == [[*pair] for pair in zip(predicted, in_reach, strict=True)]
    before = measured.nats[:, :, 0] - measured.nats[:, :, 1]  # out of reach, conditions do not differ
    np.testing.assert_allclose(before, before[:, :1].repeat(3, 1), rtol=1e-4, atol=1e-4)
    assert (measured.nats[:, 0, 1] != measured.nats[:, 1, 1]).all()


def test_evaluate_is_repeatable_and_restores_training_mode(config, tokenizer, retriever, rows):
    model = trained_model(config).train()
    batches = [RetroDataCollator(retriever)(rows)]
    first, second = (evaluate(model, batches, byte_lengths(tokenizer), seed=3).metrics() for _ in range(2))
    assert first == second and model.training


def test_only_the_decoder_is_measured_without_neighbors(config, tokenizer, rows):
    measured = evaluate(trained_model(config), [RetroDataCollator()(rows)], byte_lengths(tokenizer))
    assert measured.conditions == ("off",)
    assert set(measured.metrics()) == {"loss", "bits_per_byte", "loss_in_reach", "bits_per_byte_in_reach"}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("counts", [(3, 3), (4, 4, 4, 1), (2, 0, 2, 2), (5, 5, 5, 5, 5)])
def test_shuffled_neighbors_come_from_another_row(counts, seed):
    columns = max(counts)
    used = torch.arange(columns) < torch.tensor(counts)[:, None]
    number = torch.arange(used.numel()).view(len(counts), columns)  # identifies each chunk's neighbors
    ids = number[..., None, None].expand(-1, -1, 2, 3)
    mask = used[..., None, None].expand(-1, -1, 2, 3)
    moved = shuffle_neighbors({"neighbor_ids": ids, "neighbor_attention_mask": mask, "number": number}, seed)
    shuffled = moved["neighbor_ids"]
    assert torch.equal(mask, moved["neighbor_attention_mask"]) and torch.equal(moved["number"], shuffled[..., 0, 0])
    came_from = shuffled[used][:, 0, 0]
    assert sorted(came_from.tolist()) == sorted(number[used].tolist())
    assert ((came_from // columns) != (number[used] // columns)).all()


def test_shuffle_within_one_row_and_of_one_chunk():
    ids = torch.arange(4).view(1, 4, 1, 1)
    neighbors = {"neighbor_ids": ids, "neighbor_attention_mask": torch.ones_like(ids, dtype=torch.bool)}
    assert (shuffle_neighbors(neighbors)["neighbor_ids"] != ids).all()
    one = {name: tensor[:, :1] for name, tensor in neighbors.items()}
    assert not shuffle_neighbors(one)["neighbor_attention_mask"].any()


def test_gain_and_its_standard_error():
    dice = np.random.default_rng(0)
    sizes = dice.integers(50, 200, 400)
    saved = 0.1 * sizes * math.log(2) + dice.normal(0, 5, 400)
    gain, stderr = paired_gain(saved, sizes)
    resampled = [paired_gain(saved[pick], sizes[pick])[0] for pick in dice.integers(0, 400, (500, 400))]
    assert gain == pytest.approx(saved.sum() / sizes.sum() / math.log(2))
    assert stderr == pytest.approx(np.std(resampled), rel=0.15)
    assert math.isnan(paired_gain(saved[:1], sizes[:1])[1])


def test_gain_over_another_model_pairs_sequences():
    ours = Evaluation(np.full((3, 1, 2), 10.0), np.full((3, 2, 2), 8))
    theirs = Evaluation(np.full((3, 1, 2), 12.0), np.full((3, 2, 2), 8))
    gain, stderr = ours.gain(theirs.condition_nats("off"), condition="off")
    assert gain == pytest.approx(2 / 8 / math.log(2)) and stderr == pytest.approx(0)
