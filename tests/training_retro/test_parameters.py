"""A run begins with a table of the parameters of each part."""

import re

import pytest

import training_retro
from training_retro.parameters import parameter_table

from ..support.runs import OVERRIDES, flags, knowledge_base

ALL_PARTS = {"decoder", "neighbor encoder", "cross-attention", "copy head"}


def numbers(table):
    """Read a table back: part -> (total, trained)."""
    rows = re.findall(r"^(\S.*?) {2,}([\d,]+) +([\d,]+)", table, re.MULTILINE)
    return {part: tuple(int(number.replace(",", "")) for number in pair) for part, *pair in rows}


@pytest.mark.parametrize(
    "settings, trained",
    [
        ({"freeze_backbone": "true"}, ALL_PARTS - {"decoder"}),
        ({}, ALL_PARTS),
        ({"knowledge_base": None}, {"decoder"}),
        ({"lora": "{r: 2, target_modules: [c_attn]}"}, ALL_PARTS - {"decoder"} | {"LoRA adapters"}),
    ],
    ids=["retrofit", "all", "no_neighbors", "lora"],
)
def test_the_log_begins_with_the_parameters_of_each_part(world, tokenizer_folder, tmp_path, caplog, settings, trained):
    overrides = OVERRIDES.replace("}", ", copy_head: true}")
    settings = {"config_overrides": overrides, **knowledge_base(world), **settings}
    with caplog.at_level("INFO"):
        trainer = training_retro.build_trainer(
            *training_retro.parse_arguments(flags(world, tokenizer_folder, tmp_path, **settings)), tmp_path / "c"
        )
    table = parameter_table(trainer.model)
    assert table in caplog.text
    found = numbers(table)
    total, own = found.pop("all")
    assert {part for part, pair in found.items() if pair[1]} == trained
    sizes = [(p.numel(), p.numel() * p.requires_grad) for p in trainer.model.parameters()]
    assert (
        (total, own) == tuple(map(sum, zip(*sizes, strict=True))) == tuple(map(sum, zip(*found.values(), strict=True)))
    )
    if "lora" not in settings:
        decoder = sum(
            p.numel()
            for name, p in trainer.model.named_parameters()
            if not re.search(r"\.(ln_)?cca\.|\.encoder\.|copy_head\.", name)
        )
        assert found["decoder"][0] == decoder
    if trainer.retro.retriever is not None:
        trainer.retro.retriever.close()
