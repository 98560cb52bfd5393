"""Neighbors reach training ahead of time, precomputed or fetched, and their problems are named."""

import shutil
import threading
from types import SimpleNamespace

import pytest
import torch

import train_hf
import training_retro.trainer

from ..support.runs import OVERRIDES, flags, knowledge_base, losses, train
from ..support.training_world import CHUNK


def test_prefetching_changes_no_loss(world, tokenizer_folder, tmp_path):
    changes = {"neighbor_dropout": 0.3, "gradient_accumulation_steps": 2, **knowledge_base(world)}
    overrides = {"config_overrides": OVERRIDES.replace("embd_pdrop: 0.0", "embd_pdrop: 0.1")}
    runs = [
        train(
            flags(world, tokenizer_folder, tmp_path / "run", prefetch_batches=n, **overrides, **changes),
            tmp_path / f"{n}",
        )
        for n in (0, 3)
    ]
    assert losses(runs[0]) == losses(runs[1])


def test_precomputed_neighbors_give_the_same_run_without_a_knowledge_base(world, tokenizer_folder, tmp_path):
    train_hf.main(
        flags(world, tokenizer_folder, tmp_path / "run", precompute_to=tmp_path / "stored", **knowledge_base(world))
    )
    given = {"train_data": None, "validation_data": None, "precomputed": tmp_path / "stored"}

    def batches(**changes):
        arguments = training_retro.parse_arguments(flags(world, tokenizer_folder, tmp_path / "run", **changes))
        trainer = training_retro.build_trainer(*arguments, tmp_path / "c")
        seen = [*trainer.get_train_dataloader(), *trainer.get_eval_dataloader()]
        if trainer.model.retriever is not None:
            trainer.model.retriever.close()
        return seen

    fetched, stored_batches = batches(**knowledge_base(world)), batches(**given)
    assert len(fetched) == len(stored_batches) > 20
    for one, other in zip(fetched, stored_batches, strict=True):
        assert one.keys() == other.keys()
        # The last bits of a similarity depend on how many chunks Milvus searches for at once.
        torch.testing.assert_close(one.pop("neighbor_scores"), other.pop("neighbor_scores"), atol=1e-6, rtol=0)
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
    stored = train(flags(world, tokenizer_folder, tmp_path / "run", **given), tmp_path / "c")
    while_training = train(flags(world, tokenizer_folder, tmp_path / "run", **knowledge_base(world)), tmp_path / "c2")
    for one, other in zip(stored.state.log_history, while_training.state.log_history, strict=True):
        for name in ("chunks_with_neighbors", "mean_similarity"):
            assert one.get(name) == pytest.approx(other.get(name), abs=1e-5) and (name in one) == ("loss" in one)
    assert losses(stored)[-1] < losses(stored)[0] and stored.model.config.collection_name == "texts"
    row = stored.train_dataset[0]
    assert torch.tensor(row["neighbor_ids"]).shape == (len(row["input_ids"]) // CHUNK, 2, 2 * CHUNK)
    with pytest.raises(SystemExit, match="block_size 64, this run has 32"):
        train_hf.main(flags(world, tokenizer_folder, tmp_path / "run", block_size=32, **given))
    with pytest.raises(SystemExit, match="holds no precomputed neighbors"):
        train_hf.main(flags(world, tokenizer_folder, tmp_path / "run", **{**given, "precomputed": world}))


def test_the_batches_of_the_next_update_are_made_during_an_update(world, tokenizer_folder, tmp_path):
    changes = {
        "gradient_accumulation_steps": 6,
        "prefetch_batches": 2,
        "per_device_train_batch_size": 1,
        "max_steps": 2,
    }
    arguments = flags(world, tokenizer_folder, tmp_path / "run", **changes, **knowledge_base(world))
    trainer = training_retro.build_trainer(*training_retro.parse_arguments(arguments), tmp_path)
    collate, step, made, computed = trainer.data_collator, trainer.training_step, [], []
    all_made = threading.Event()

    def training_step(*args, **kwargs):
        computed.append(1)
        if len(computed) == 1:  # the model is busy with the first update
            assert all_made.wait(600)
        return step(*args, **kwargs)

    def collated(features):
        made.append(1)
        if len(made) == 12:
            all_made.set()
        return collate(features)

    trainer.data_collator = collated
    trainer.training_step = training_step
    trainer.train()
    trainer.model.retriever.close()
    assert len(computed) == 12


def test_a_search_that_fails_ends_the_run_with_its_cause(world, tokenizer_folder, tmp_path):
    trainer = training_retro.build_trainer(
        *training_retro.parse_arguments(flags(world, tokenizer_folder, tmp_path / "run", **knowledge_base(world))),
        tmp_path,
    )
    try:
        trainer.model.retriever._search = lambda queries: 1 / 0
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        assert trainer._batches is None  # and nothing reads on
    finally:
        trainer.model.retriever.close()


@pytest.mark.parametrize(("search", "step", "share"), [(3, 1, 0.75), (1, 3, 0.25)])
def test_a_retriever_that_is_too_slow_is_logged(
    world, tokenizer_folder, tmp_path, caplog, monkeypatch, search, step, share
):
    """The clock of this test moves only with a batch's search and with a training step."""
    now = [0.0]
    for module in (training_retro.trainer, training_retro.progress):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def taking(seconds, call):
        def timed(*args, **kwargs):
            now[0] += seconds
            return call(*args, **kwargs)

        return timed

    settings = {"prefetch_batches": 0, **knowledge_base(world)}
    arguments = training_retro.parse_arguments(flags(world, tokenizer_folder, tmp_path, **settings))
    trainer = training_retro.build_trainer(*arguments, tmp_path / "c")
    trainer.data_collator = taking(search, trainer.data_collator)
    trainer.training_step = taking(step, trainer.training_step)
    with caplog.at_level("INFO"):
        trainer.train()
    trainer.model.retriever.close()
    assert trainer.state.log_history[3]["retrieval_wait"] == share
    assert caplog.text.count("Training waits for batches 75 %") == (share == 0.75)  # once a run


@pytest.mark.parametrize("streaming", [False, True])
def test_text_that_the_knowledge_base_has_under_other_ids_is_logged(
    world, tokenizer_folder, tmp_path, streaming, caplog
):
    copy = tmp_path / "renamed"
    shutil.copytree(world / "train", copy)
    for folder, named in ((world / "train", False), (copy, True)):
        caplog.clear()
        changes = {"train_data": folder, "streaming": streaming, **knowledge_base(world)}
        arguments = training_retro.parse_arguments(flags(world, tokenizer_folder, tmp_path / "run", **changes))
        trainer = training_retro.build_trainer(*arguments, tmp_path / f"c{named}")
        trainer.model.retriever.close()
        assert ("the knowledge base has the text of" in caplog.text) == named
        assert ("'renamed/0.txt' in a document of another id, 'train/0.txt'" in caplog.text) == named
