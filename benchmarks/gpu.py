"""Measure RETRO on one GPU: check its results, then time decoding and training.

    pip install --no-deps retro-pytorch==0.3.9 && pip install einops
    python benchmarks/gpu.py results

The results are printed and written to the folder `results` after each phase, as gpu.md and
gpu.json; errors and messages of the sides are in gpu.log. The whole run ends within `--minutes`.

- Checks: a model's logits, gradients and greedy tokens on the GPU against those on the CPU.
- Decoding: milliseconds a token and tokens/s in bfloat16, with a dynamic cache, with a static
  cache, and compiled as the library does it. The prompt's pass and the first steps do not count.
  A profile counts the kernels of a token, and the places where the CPU waits for the GPU.
- Training: tokens/s, memory and MFU of steps of AdamW under bfloat16 autocast. MFU is the model
  FLOPs (see gpu_training.py) over what a large matrix product reaches on this GPU, and over the
  data sheet's figure.

All models have gpt2-small's sizes and random weights. The neighbors are random and given, so
nothing is searched and the GPU alone is measured. Each side is a process of its own. The sides take
turns; median, least and most over the rounds are printed. Sides start and compile at the same time,
but only one runs while it is measured.

retro-pytorch is installed without its dependencies: its model needs only torch and einops, while
its search (autofaiss, which wants an older numpy) is not used here. Without it, its row says so.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_report import Report
from gpu_sides import CACHES, DECODING, MODES, TRAINING
from workers import Answer, Turns, Worker, serve

# parts of the run at which its phases end; time that a phase leaves goes to the next
PHASE_ENDS = {"checks": 0.2, "decoding": 0.35, "compiled decoding": 0.65, "training": 0.75, "compiled training": 0.97}
GRACE = 0.02  # of the run: how long a measurement may go on beyond its phase
STEPS = 3  # training steps of a side's turn


@dataclass
class Plan:
    """The sides to measure, and how long each takes.

    Attributes:
        device: where. None: the GPU if there is one.
        is_small: tiny models and few tokens, to try the script itself.
        minutes: the run ends after these.
        rounds: measured rounds at most.
        batch_sizes: rows of a training step; the first that all sides have memory for is used.
        length: tokens of a training sequence.
        decoding, training: the names of the sides.
    """

    device: str | None
    is_small: bool
    minutes: float
    rounds: int
    batch_sizes: Sequence[int] = (16, 8, 4)
    length: int = 1024
    decoding: Sequence[str] = tuple(DECODING)
    training: Sequence[str] = tuple(TRAINING)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        # tokens of the prompt, new tokens and rows of decoding; size of the product for the peak
        self.prompt, self.new, self.decoded_rows, self.peak_size = 128, 128, (1, 8), 8192
        if self.is_small:
            self.prompt, self.new, self.decoded_rows, self.peak_size = 20, 16, (1, 2), 64
            self.batch_sizes, self.length = (2,), 64

    def end_of(self, phase: str, grace: float = 0.0) -> float:
        """Return the time at which a phase ends, as `time.monotonic` counts."""
        return self.started + 60 * self.minutes * (PHASE_ENDS[phase] + grace)


class Run:
    """One run of the benchmark: its plan, its report, and the workers that are alive.

    Args:
        start: starts the worker of a kind ("checks", "decoding", "training") and a side.
    """

    def __init__(self, plan: Plan, report: Report, start: Callable[[str, str], Worker]) -> None:
        self.plan, self.report, self._start = plan, report, start
        self.workers: list[Worker] = []

    def run(self) -> None:
        """Run all phases. A phase that fails is reported, and the next one begins."""
        try:
            checker = self.start("checks", ["checks"])["checks"]
            decoders = self.start("decoding", self.plan.decoding)
            self._attempt("checks", self.check, checker)
            decoding = self._attempt("decoding", self.decode, decoders)
            trainers = self.start("training", self.plan.training)  # they get ready while the others compile
            if decoding is not None:
                self._attempt("compiled decoding", self.decode_compiled, decoding)
            self._attempt("training", self.train, trainers)
        finally:
            for worker in self.workers:
                worker.close()
            self.report.write()

    def start(self, kind: str, sides: Sequence[str]) -> dict[str, Worker]:
        """Start a worker for each side."""
        started = {side: self._start(kind, side) for side in sides}
        self.workers += started.values()
        return started

    def _attempt(self, phase: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            self.report.failed(phase, error)
        finally:
            self.report.write()

    def check(self, worker: Worker) -> None:
        """Check results, one model and one property at a time; then name the machine."""
        plan, last = self.plan, self.plan.end_of("checks", GRACE)
        worker.ask(what="list", is_small=plan.is_small)
        listed = worker.answer(last)
        if "error" in listed:
            self.report.add("checks", check="all", **listed)
        for name in listed.get("checks", []):
            answer: Answer = {"error": "out of time"}
            if time.monotonic() < plan.end_of("checks"):
                worker.ask(what="check", name=name)
                answer = worker.answer(last)
            self.report.add("checks", check=name, **answer)
        if worker.is_lost:  # the peak is needed all the same
            worker = self.start("checks", ["machine"])["machine"]
        worker.ask(what="machine", size=plan.peak_size)
        self.report.machine(worker.answer(plan.end_of("decoding")))
        worker.close()

    def decode(self, workers: Mapping[str, Worker]) -> Turns:
        """Time decoding with the caches that need no compilation."""
        turns = Turns(workers, self.plan.end_of("decoding"), self.plan.end_of("decoding", GRACE))
        tasks = [{"cache": cache, "rows": rows} for rows in self.plan.decoded_rows for cache in CACHES[:-1]]
        turns.prepare(tasks)
        turns.measure(tasks, self.plan.rounds)
        self.report.decoding(turns.answers)
        return turns

    def decode_compiled(self, turns: Turns) -> None:
        """Time decoding with a compiled model and a static cache."""
        turns.end = self.plan.end_of("compiled decoding")
        for rows in self.plan.decoded_rows:
            task = {"cache": CACHES[-1], "rows": rows}
            turns.limit = self.plan.end_of("compiled decoding", -2 * GRACE)  # leaves time to measure the others
            turns.prepare([task])
            turns.limit = self.plan.end_of("compiled decoding", GRACE)
            turns.measure([task], self.plan.rounds)
            self.report.decoding(turns.answers)
        for side, worker in turns.workers.items():  # at last: a profiler may end the process
            if time.monotonic() < turns.end:
                worker.ask(profile=True)
                self.report.add("profile", side=side, **worker.answer(turns.limit))
        turns.close()

    def train(self, workers: Mapping[str, Worker]) -> None:
        """Time training with the largest batch that all sides have memory for, then compiled."""
        plan = self.plan
        turns = Turns(workers, plan.end_of("training"), plan.end_of("training", GRACE))
        for rows in plan.batch_sizes:
            tasks = [{"mode": mode, "rows": rows, "steps": STEPS} for mode in MODES]
            turns.measure(tasks[:1], 1)
            if not turns.drop_errors("OutOfMemory"):
                break
            turns.answers.clear()
        turns.measure(tasks[:1], plan.rounds - 1)
        self.report.training(turns.answers, plan.length)

        turns.end = plan.end_of("compiled training")
        eager_only = {side: worker for side, worker in turns.workers.items() if not TRAINING[side].compiled}
        turns.workers = {side: worker for side, worker in turns.workers.items() if TRAINING[side].compiled}
        turns.limit = plan.end_of("compiled training", -2 * GRACE)
        turns.prepare(tasks[1:])
        turns.limit = plan.end_of("compiled training", GRACE)
        turns.drop_errors("OutOfMemory")  # there may be memory for one side at a time
        turns.measure(tasks[1:], plan.rounds)
        turns.workers = {**turns.workers, **eager_only}
        self.report.training(turns.answers, plan.length)
        turns.close()


def serve_side(kind: str, side: str, plan: Plan) -> None:
    """Be the worker of one side."""
    # imported here: the process that only waits for the others starts at once
    import torch
    from gpt2_small import GPT2_SMALL, TINY

    device = torch.device(plan.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sizes = TINY if plan.is_small else GPT2_SMALL
    if kind == "decoding":
        from gpu_decoding import Decoder

        serve(lambda: Decoder(side, sizes, device, plan.prompt, plan.new))
    elif kind == "training":
        from gpu_training import Trainer

        serve(lambda: Trainer(side, sizes, device, plan.length))
    else:
        from gpu_checks import Checker

        serve(lambda: Checker(device))


def main() -> None:
    """Measure, or serve one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the results, created if it is missing")
    parser.add_argument("--minutes", type=float, default=8.5, help="minutes until the run ends")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each phase, if there is time")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=Plan.batch_sizes, help="training rows, in order")
    parser.add_argument("--length", type=int, default=Plan.length, help="tokens of a training sequence, times of 64")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script without a GPU")
    parser.add_argument("--device", help="default: the GPU if there is one, else the CPU")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = {"batch_sizes": options.batch_sizes, "length": options.length}
    plan = Plan(options.device, options.small, options.minutes, options.rounds, **sizes)
    if options.serve:
        return serve_side(options.serve, options.side, plan)

    threads = 1 + (os.cpu_count() or 1) // len(DECODING)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))  # sides compile at the same time
    report = Report(options.folder, " ".join(sys.argv))

    def start(kind: str, side: str) -> Worker:
        return Worker(side, [__file__, *sys.argv[1:], "--serve", kind, "--side", side], report.log)

    Run(plan, report, start).run()
    print(report.markdown())


if __name__ == "__main__":
    main()
