"""First points of their own reach training: fetched, precomputed, streamed, and after a stop."""

import json

import pytest
import torch

import train_hf
import training_retro
from data_retro.first_points import FirstPoints

from ..support.runs import OVERRIDES, flags, knowledge_base, losses, train
from ..support.training_world import CHUNK

STRIDE = 3
SHORT_STRIDE = OVERRIDES.replace("n_layer:", f"retrieval_stride: {STRIDE}, n_layer:")


def built(arguments, cache_dir):
    trainer = training_retro.build_trainer(*training_retro.parse_arguments(arguments), cache_dir)
    if trainer.model.retriever is not None:
        trainer.model.retriever.close()
    return trainer


def batches(arguments, cache_dir):
    trainer = training_retro.build_trainer(*training_retro.parse_arguments(arguments), cache_dir)
    parts = [*trainer.get_train_dataloader()], [*trainer.get_eval_dataloader()]
    if trainer.model.retriever is not None:
        trainer.model.retriever.close()
    return parts


@pytest.fixture(params=[OVERRIDES, SHORT_STRIDE], ids=["stride_of_a_chunk", "short_stride"])
def overrides(request):
    return {"config_overrides": request.param}


def test_training_sequences_have_first_points_and_held_out_ones_the_papers_grid(
    world, tokenizer_folder, tmp_path, overrides
):
    changes = {"random_first_point": "true", "seed": 5, **overrides, **knowledge_base(world)}
    train_batches, held_out = batches(flags(world, tokenizer_folder, tmp_path / "run", **changes), tmp_path / "c")
    stride = STRIDE if overrides["config_overrides"] is SHORT_STRIDE else CHUNK
    draw = FirstPoints(5, CHUNK, stride)
    seen = set()
    for batch in train_batches:
        lengths = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum(1).tolist()
        for tokens, length, point in zip(batch["input_ids"], lengths, batch["first_point"].tolist(), strict=True):
            assert point == draw.of(tokens[:length].tolist())
            seen.add(point)
    assert min(seen) < CHUNK < max(seen)
    assert not any("first_point" in batch for batch in held_out)
    assert held_out[0]["neighbor_ids"].shape[1] == (64 - CHUNK) // stride + 1


def test_precomputed_neighbors_are_those_fetched_while_training(world, tokenizer_folder, tmp_path, overrides):
    changes = {"random_first_point": "true", **overrides}
    stored = {"precompute_to": tmp_path / "stored", **changes, **knowledge_base(world)}
    train_hf.main(flags(world, tokenizer_folder, tmp_path / "run", **stored))
    fetched = batches(
        flags(world, tokenizer_folder, tmp_path / "run", **changes, **knowledge_base(world)), tmp_path / "c"
    )
    given = {"train_data": None, "validation_data": None, "precomputed": tmp_path / "stored", **overrides}
    for asked in ({}, {"random_first_point": "true"}, {"seed": 7}):  # by default, the folder decides
        read = batches(flags(world, tokenizer_folder, tmp_path / "run", **given, **asked), tmp_path / "c2")
        if "seed" in asked:  # another order of the same sequences
            assert all("first_point" in batch for batch in read[0])
            continue
        for one, other in zip(sum(fetched, []), sum(read, []), strict=True):
            assert one.keys() == other.keys()
            torch.testing.assert_close(one["neighbor_scores"], other["neighbor_scores"], atol=1e-6, rtol=0)
            assert [n for n in one if n != "neighbor_scores" and not torch.equal(one[n], other[n])] == []
    for asked, message in (
        ({"random_first_point": "false"}, "first_point_seed 42, this run has None"),
        ({"random_first_point": "true", "seed": 7}, "first_point_seed 42, this run has 7"),
        ({"config_overrides": OVERRIDES.replace("n_layer:", "retrieval_stride: 5, n_layer:")}, "this run has 5"),
    ):
        with pytest.raises(SystemExit, match=message):
            train_hf.main(flags(world, tokenizer_folder, tmp_path / "run", **(given | asked)))


def test_a_folder_of_an_earlier_version_is_on_the_papers_grid(world, tokenizer_folder, tmp_path):
    stored = tmp_path / "stored"
    train_hf.main(
        flags(
            world,
            tokenizer_folder,
            tmp_path / "run",
            precompute_to=stored,
            random_first_point="false",
            **knowledge_base(world),
        )
    )
    given = {"train_data": None, "validation_data": None, "precomputed": stored}
    new = batches(flags(world, tokenizer_folder, tmp_path / "run", **given), tmp_path / "c")
    requirements = json.loads((stored / "neighbors.json").read_text())
    earlier = requirements | {"format": 3}
    del earlier["retrieval_stride"], earlier["first_point_seed"]
    (stored / "neighbors.json").write_text(json.dumps(earlier))
    old = batches(flags(world, tokenizer_folder, tmp_path / "run", **given), tmp_path / "c")
    for one, other in zip(sum(new, []), sum(old, []), strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(SystemExit, match="retrieval_stride 8, this run has 3"):
        train_hf.main(flags(world, tokenizer_folder, tmp_path / "run", config_overrides=SHORT_STRIDE, **given))
    with pytest.raises(SystemExit, match="first_point_seed None, this run has 42"):
        train_hf.main(flags(world, tokenizer_folder, tmp_path / "run", random_first_point="true", **given))


def test_the_decoder_alone_has_no_first_points(world, tokenizer_folder, tmp_path):
    trainer = built(flags(world, tokenizer_folder, tmp_path / "run", random_first_point="true"), tmp_path / "c")
    assert "first_point" not in trainer.train_dataset.column_names


@pytest.mark.parametrize("streaming", [False, True])
def test_prefetching_and_remembering_change_no_loss(world, tokenizer_folder, tmp_path, streaming, overrides):
    changes = {"random_first_point": "true", "streaming": streaming, "max_steps": 10, **knowledge_base(world)}
    plain, ahead = (
        train(
            flags(world, tokenizer_folder, tmp_path / "run", **changes, **overrides, **settings),
            tmp_path / settings["prefetch_batches"],
        )
        for settings in (
            {"prefetch_batches": "0", "neighbor_cache_size": 0},
            {"prefetch_batches": "3", "neighbor_cache_size": 1000},
        )
    )
    assert losses(plain) == losses(ahead)
    assert all(0.9 < entry["chunks_with_neighbors"] <= 1 for entry in plain.state.log_history if "loss" in entry)
