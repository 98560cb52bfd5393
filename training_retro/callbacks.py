"""Callbacks of a training run: benchmarks at each evaluation, and a clean stop on SIGTERM."""

import logging
import signal
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from evaluation_retro.benchmarks import BenchmarkSettings, run_benchmarks

logger = logging.getLogger(__name__)


class BenchmarkCallback(TrainerCallback):
    """DeepEval's benchmarks at each evaluation, with neighbors and without, as further numbers of that evaluation."""

    def __init__(self, trainer: Trainer, settings: BenchmarkSettings) -> None:
        self.trainer, self.settings = trainer, settings

    def on_evaluate(self, args, state, control, *, metrics: dict[str, float], **kwargs) -> None:
        # by every process: the weights may be spread over all
        scores = run_benchmarks(self.trainer.model, self.trainer.processing_class, self.settings)
        scores = {f"eval_{name}": score for name, score in scores.items()}
        metrics.update(scores)
        self.trainer.log(dict(scores))


class StopOnSignal(TrainerCallback):
    """SIGTERM, as a cluster sends it before it takes a machine away: finish the step, save a checkpoint, end."""

    def __init__(self) -> None:
        self.asked = self.stopped = False
        self._before: Any = None

    def on_train_begin(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.asked = self.stopped = False
        self._before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked", True))

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        asked = self.asked
        if dist.is_initialized():  # all stop after the same step
            votes = torch.tensor(float(asked), device=args.device)
            dist.all_reduce(votes)
            asked = bool(votes > 0)
        if asked:
            logger.info(
                "Asked to end: saving a checkpoint after step %d; --resume_from_checkpoint true goes on.",
                state.global_step,
            )
            self.stopped = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        signal.signal(signal.SIGTERM, self._before)
