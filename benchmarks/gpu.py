"""Measure RETRO on one GPU: check its results, then time decoding and training.

    pip install --no-deps retro-pytorch==0.3.9 && pip install einops
    python benchmarks/gpu.py results

The results are printed and written to the folder `results` after each phase, as gpu.md and
gpu.json; errors and messages of the sides are in gpu.log. The whole run ends within `--minutes`.

- Checks: a model's logits, gradients and greedy tokens on the GPU against those on the CPU.
- Decoding: milliseconds a token and tokens/s in bfloat16, with a dynamic cache, with a static
  cache, and compiled as the library does it. The prompt's pass and the first steps do not count.
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

import gpu_checks
import gpu_decoding
import gpu_training
import torch
import transformers
from gpt2_small import GPT2_SMALL, TINY
from gpu_report import Report
from workers import Answer, Worker, serve

PHASE_ENDS = {"checks": 0.2, "decoding": 0.4, "compiled decoding": 0.65, "training": 0.8, "compiled training": 1.0}
GRACE = 15.0  # seconds that a measurement may run beyond its phase
STARTED = time.monotonic()


@dataclass
class Plan:
    """What is measured, and how long.

    Attributes:
        device: where.
        is_small: tiny models and few tokens, to try the script itself.
        minutes: when the run ends.
        rounds: measured rounds at most.
        batch_sizes: rows of a training step, the largest that all sides have memory for.
        length: tokens of a training sequence.
    """

    device: str
    is_small: bool
    minutes: float
    rounds: int
    batch_sizes: Sequence[int]
    length: int
    prompt: int = field(init=False)
    new: int = field(init=False)
    decoded_rows: Sequence[int] = field(init=False)  # batch sizes of decoding
    peak_size: int = field(init=False)  # rows and columns of the matrices whose product gives the peak

    def __post_init__(self) -> None:
        self.prompt, self.new, self.decoded_rows, self.peak_size = 128, 128, (1, 8), 8192
        if self.is_small:
            self.prompt, self.new, self.decoded_rows, self.peak_size = 20, 16, (1, 2), 64
            self.batch_sizes, self.length = (2,), 64

    def end_of(self, phase: str) -> float:
        """Return the time at which a phase ends."""
        return STARTED + 60 * self.minutes * PHASE_ENDS[phase]


class Turns:
    """Workers that take turns, and what they answered.

    Attributes:
        workers: by side.
        answers: by side and task, the answers of measured rounds; an error ends the list.
    """

    def __init__(self, workers: Mapping[str, Worker], end: float) -> None:
        self.workers, self.end = workers, end
        self.answers: dict[tuple[str, tuple], list[Answer]] = {}

    def has_failed(self, side: str, task: Mapping[str, Any]) -> bool:
        """Return True if the side is gone, or could not do the task."""
        answers = self.answers.get((side, tuple(task.values())), [])
        return bool(answers and "error" in answers[-1])

    def prepare(self, tasks: Sequence[Mapping[str, Any]]) -> None:
        """Let all workers do tasks at the same time, unmeasured: they compile and warm up."""
        for task in tasks:
            for worker in self.workers.values():
                worker.ask(**task)
            for side, worker in self.workers.items():
                answer = worker.answer(self.end)
                if "error" in answer:
                    self.answers[side, tuple(task.values())] = [answer]

    def measure(self, tasks: Sequence[Mapping[str, Any]], rounds: int) -> None:
        """Let the workers do tasks one after the other, as often as there is time."""
        for _ in range(rounds):
            for side, worker in self.workers.items():
                for task in tasks:
                    if time.monotonic() > self.end:
                        return
                    if not self.has_failed(side, task):
                        worker.ask(**task)
                        found = self.answers.setdefault((side, tuple(task.values())), [])
                        found.append(worker.answer(self.end + GRACE))

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers.values():
            worker.close()


class Run:
    """One run of the benchmark: its plan, its report, and the workers that are alive."""

    def __init__(self, plan: Plan, report: Report, arguments: Sequence[str]) -> None:
        self.plan, self.report, self.arguments = plan, report, arguments
        self.workers: list[Worker] = []

    def start(self, kind: str, sides: Sequence[str]) -> dict[str, Worker]:
        """Start a worker for each side."""
        started = {}
        for side in sides:
            command = [__file__, *self.arguments, "--serve", kind, "--side", side]
            started[side] = Worker(side, command, self.report.log)
        self.workers += started.values()
        return started

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers:
            worker.close()

    def check(self, worker: Worker) -> None:
        """Check results, one model and one property at a time."""
        for sizes in ("tiny",) if self.plan.is_small else gpu_checks.SIZES:
            for check in gpu_checks.checks(sizes):
                if time.monotonic() > self.plan.end_of("checks"):
                    answer: Answer = {"error": "out of time"}
                else:
                    worker.ask(sizes=sizes, check=check)
                    answer = worker.answer(self.plan.end_of("checks") + GRACE)
                self.report.add("checks", sizes=sizes, check=check, **answer)

    def decode(self, workers: Mapping[str, Worker]) -> Turns:
        """Time decoding with the caches that need no compilation."""
        turns = Turns(workers, self.plan.end_of("decoding"))
        tasks = [
            {"cache": cache, "batch_size": rows} for rows in self.plan.decoded_rows for cache in ("dynamic", "static")
        ]
        turns.prepare(tasks)
        turns.measure(tasks, self.plan.rounds)
        self.report.decoding(turns.answers)
        return turns

    def decode_compiled(self, turns: Turns) -> None:
        """Time decoding with a compiled model and a static cache."""
        turns.end = self.plan.end_of("compiled decoding")
        for rows in self.plan.decoded_rows:
            task = {"cache": "compiled", "batch_size": rows}
            turns.prepare([task])
            turns.measure([task], self.plan.rounds)
            self.report.decoding(turns.answers)
        turns.close()

    def train(self, workers: Mapping[str, Worker]) -> None:
        """Time training with the largest batch that all sides have memory for; then compiled."""
        turns = Turns(workers, self.plan.end_of("training"))
        task: dict[str, Any] = {}
        for batch_size in self.plan.batch_sizes:
            task = {"mode": "eager", "batch_size": batch_size, "steps": 1}
            turns.answers.clear()
            turns.measure([task], 1)
            if not any("OutOfMemory" in answers[-1].get("error", "") for answers in turns.answers.values()):
                break
        failed = [side for side in workers if turns.has_failed(side, task)]
        errors = {
            (side, ("eager", task["batch_size"], "-")): turns.answers[side, tuple(task.values())] for side in failed
        }
        turns.answers.clear()
        turns.answers |= errors
        turns.workers = {side: worker for side, worker in workers.items() if side not in failed}
        tasks = [{"mode": mode, "batch_size": task["batch_size"], "steps": 3} for mode in gpu_training.MODES]
        turns.measure(tasks[:1], 2)
        self.report.training(turns.answers, self.plan.length)

        turns.end = self.plan.end_of("compiled training")
        compiled = {side: worker for side, worker in turns.workers.items() if side != gpu_training.NOT_COMPILED}
        others = Turns(compiled, turns.end)
        others.prepare([tasks[1]])
        for side, answers in list(others.answers.items()):  # there may be memory for one at a time
            if "OutOfMemory" in answers[-1]["error"]:
                del others.answers[side]
        others.answers |= turns.answers
        others.measure(tasks, self.plan.rounds)
        self.report.training(others.answers, self.plan.length)
        turns.close()


def attempt(report: Report, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a phase; an error is reported, and the run goes on."""
    try:
        return function(*arguments)
    except Exception as error:
        report.failed(name, error)
    finally:
        report.write()


def serve_side(kind: str, side: str, plan: Plan) -> None:
    """Be the worker of one side."""
    device = torch.device(plan.device)
    sizes = TINY if plan.is_small else GPT2_SMALL
    if kind == "decoding":
        serve(Later(lambda: gpu_decoding.Decoder(side, sizes, device, plan.prompt, plan.new)))
    elif kind == "training":
        serve(Later(lambda: gpu_training.Trainer(side, sizes, device, plan.length)))
    else:
        checker = gpu_checks.Checker(device)
        serve(lambda task: about(device, plan.peak_size) if task.get("about") else checker(task))


class Later:
    """Calls what `build` returns, which is built for the first task, so that its errors are answers."""

    def __init__(self, build: Callable[[], Callable[[dict], dict]]) -> None:
        self._build = build
        self._built: Callable[[dict], dict] | None = None

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """Do a task."""
        if self._built is None:
            self._built = self._build()
        return self._built(task)


def about(device: torch.device, size: int) -> dict[str, Any]:
    """Return the machine, and the FLOP/s of a large bfloat16 product."""
    is_cuda = device.type == "cuda"
    versions = {"torch": torch.__version__, "CUDA": torch.version.cuda, "transformers": transformers.__version__}
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else f"{torch.get_num_threads()} CPU threads",
        "cores": os.cpu_count(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "peak": gpu_training.measured_peak(device, size),
    }


def main() -> None:
    """Measure, or serve one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the results, created if it is missing")
    parser.add_argument("--minutes", type=float, default=6.0, help="minutes until the run ends")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each phase, if there is time")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 8, 4], help="training rows, tried in order")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a training sequence, a multiple of 64")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script without a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    plan = Plan(options.device, options.small, options.minutes, options.rounds, options.batch_sizes, options.length)
    if options.serve:
        return serve_side(options.serve, options.side, plan)

    threads = max(1, (os.cpu_count() or 1) // len(gpu_decoding.SIDES))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))  # sides compile at the same time
    report = Report(options.folder, " ".join(sys.argv))
    run = Run(plan, report, sys.argv[1:])
    try:
        checker = run.start("checks", ["checks"])["checks"]
        decoders = run.start("decoding", list(gpu_decoding.SIDES))
        attempt(report, "checks", run.check, checker)
        checker.ask(about=True)
        report.machine(checker.answer(plan.end_of("checks") + 2 * GRACE))
        checker.close()
        turns = attempt(report, "decoding", run.decode, decoders)
        trainers = run.start("training", list(gpu_training.SIDES))
        if turns is not None:
            attempt(report, "compiled decoding", run.decode_compiled, turns)
        attempt(report, "training", run.train, trainers)
    finally:
        run.close()
        report.write()
    print(report.markdown())


if __name__ == "__main__":
    main()
