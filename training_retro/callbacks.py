"""Callbacks of a training run: benchmarks at each evaluation, and a clean stop on SIGTERM."""

import logging
import signal
from typing import Any

import torch
import torch.distributed as dist
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from evaluation_retro.benchmarks import BenchmarkSettings, run_benchmarks

logger = logging.getLogger(__name__)


class BenchmarkCallback(TrainerCallback):
    """Runs DeepEval's benchmarks at each evaluation, with neighbors and without.

    Args:
        trainer: has the model and its tokenizer. Its log gets the scores, as further numbers of the
            evaluation.
        settings: the benchmarks.

    Raises:
        ValueError: DeepEval is not installed, or has no such benchmark, option or task.
    """

    def __init__(self, trainer: Trainer, settings: BenchmarkSettings) -> None:
        settings.build()  # fails now rather than at the first evaluation
        self.trainer, self.settings = trainer, settings

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the scores to the evaluation's metrics and to the log."""
        model, tokenizer = self.trainer.model, self.trainer.processing_class
        assert isinstance(model, torch.nn.Module) and isinstance(tokenizer, PreTrainedTokenizerBase)
        # Run by every process: the weights may be spread over all of them.
        scores = run_benchmarks(model, tokenizer, self.settings)
        scores = {f"eval_{name}": score for name, score in scores.items()}
        kwargs["metrics"].update(scores)
        self.trainer.log(dict(scores))


class StopOnSignal(TrainerCallback):
    """On SIGTERM, finishes the step, saves a checkpoint and ends the training.

    A cluster sends SIGTERM before it takes a machine away.

    Attributes:
        asked: this process got the signal.
        stopped: the training ended because a process got the signal.
    """

    def __init__(self) -> None:
        self.asked = self.stopped = False
        self._before: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen for the signal."""
        self.asked = self.stopped = False
        self._before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked", True))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the training if any process got the signal; all end after the same step."""
        asked = self.asked
        if dist.is_initialized():
            votes = torch.tensor(float(asked), device=args.device)
            dist.all_reduce(votes)
            asked = bool(votes > 0)
        if asked:
            logger.info(
                "Got SIGTERM: saving a checkpoint after step %d. Continue with --resume_from_checkpoint true.",
                state.global_step,
            )
            self.stopped = control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore what the signal did before."""
        signal.signal(signal.SIGTERM, self._before)
