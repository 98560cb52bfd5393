"""The GPU benchmark runs on the CPU with tiny models: its checks, timings, FLOPs and report."""

import json

import gpu
import gpu_checks
import gpu_training
import pytest
import torch
from gpt2_small import TINY, build_gpt2, build_retro
from gpu_decoding import Decoder
from gpu_report import Report
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")
LENGTH = 4 * TINY.chunk
DECODING = ("GPT-2", "RETRO, copy head alone")
TRAINING = ("RETRO, cross-attention, eager attention", "retro-pytorch")


@pytest.mark.parametrize("side", ["GPT-2", "cross-attention", "both"])
@torch.no_grad()
def test_flops_are_those_that_pytorch_counts(side):
    # its counter knows eager attention, whose products are matrix products
    if side == "GPT-2":
        model = build_gpt2(TINY, LENGTH, attn_implementation="eager")
    else:
        model = build_retro(TINY, LENGTH, attn_implementation="eager", copy_head=side == "both")
    inputs = {} if side == "GPT-2" else {"neighbor_ids": TINY.random_neighbors(3, LENGTH // TINY.chunk)}
    with FlopCounterMode(display=False) as counter:
        model(TINY.random_tokens(3, LENGTH), use_cache=False, **inputs)
    matched = model.config.match_length if side == "both" else 0
    expected = gpu_training.forward_flops(TINY, LENGTH, reads=side != "GPT-2", matched=matched)
    assert counter.get_total_flops() == 3 * expected


def test_checks_find_a_device_that_computes_something_else():
    checker = gpu_checks.Checker(CPU)
    names = [name for name in gpu_checks.checks() if name.startswith("tiny") and "compiled" not in name]
    assert all(checker.run(name)["passed"] for name in names)
    with torch.no_grad():
        tokens = checker.pairs["tiny"].other.transformer.wte.weight
        tokens.copy_(tokens.flip(0))
    assert not any(checker.run(name)["passed"] for name in names)


class InThisProcess:
    """A worker without a process."""

    is_lost = False

    def __init__(self, build):
        self.build, self.handle, self.last = build, None, {}

    def ask(self, **task):
        try:
            self.handle = self.handle or self.build()
            self.last = self.handle(task)
        except ImportError as error:
            self.last = {"error": str(error)}
        if "checks" in self.last:
            self.last["checks"] = [name for name in self.last["checks"] if "logits" in name]

    def answer(self, deadline=None):
        return self.last

    def close(self):
        self.is_lost = True


def test_a_small_run_reports_every_phase(tmp_path):
    plan = gpu.Plan("cpu", True, minutes=5, rounds=2, decoding=DECODING, training=TRAINING)
    plan.decoded_rows = (2,)
    kinds = {
        "checks": lambda side: gpu_checks.Checker(CPU),
        "decoding": lambda side: Decoder(side, TINY, CPU, plan.prompt, plan.new),
        "training": lambda side: gpu_training.Trainer(side, TINY, CPU, plan.length),
    }
    report = Report(tmp_path / "results", "gpu.py --small")
    gpu.Run(plan, report, lambda kind, side: InThisProcess(lambda: kinds[kind](side))).run()

    found = json.loads((tmp_path / "results" / "gpu.json").read_text())
    assert "failed" not in found and found["about"]["peak"] > 0
    assert len(found["checks"]) == 6 and all(row["passed"] for row in found["checks"])
    decoded = {(row["side"], row["cache"]): row for row in found["decoding"]}
    assert decoded.keys() == {(side, cache) for side in DECODING for cache in gpu.CACHES}
    assert all(len(row["ms"]) == 2 and row["batch_size"] == 2 for row in decoded.values())
    ours, theirs = found["training"][:2]
    assert len(ours["seconds"]) == 2 * gpu.STEPS
    assert ours["mfu"] == pytest.approx(
        ours["flops_of_a_step"] * ours["tokens_per_second"] / 128 / found["about"]["peak"]
    )
    assert theirs["side"] == "retro-pytorch" and ("error" in theirs or theirs["seconds"])
    lines = (tmp_path / "results" / "gpu.md").read_text().splitlines()
    assert f"| {TRAINING[0]} | eager | 2 |" in "\n".join(lines)


def test_a_phase_that_fails_is_reported_and_the_next_one_runs(tmp_path):
    plan = gpu.Plan("cpu", True, minutes=5, rounds=1, decoding=DECODING[:1], training=TRAINING[:1])

    def start(kind, side):
        if kind == "checks":
            return InThisProcess(lambda: 1 / 0)
        return InThisProcess(
            lambda: gpu_training.Trainer(side, TINY, CPU, plan.length) if kind == "training" else 1 / 0
        )

    report = Report(tmp_path, "gpu.py")
    gpu.Run(plan, report, start).run()
    assert [row["phase"] for row in report.sections["failed"]] == ["checks", "decoding"]
    assert report.sections["training"][0]["tokens_per_second"] > 0
    assert "ZeroDivisionError" in (tmp_path / "gpu.md").read_text()
