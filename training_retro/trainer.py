"""RetroTrainer: `Trainer` that reads ahead, resumes streams exactly, and measures neighbors."""

import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from data_retro.packing import PackedStream
from data_retro.prefetch import Prefetcher
from evaluation_retro import Evaluation, best_weight, byte_lengths, sequence_nats, weight_nats
from modeling_retro import RetroForCausalLM
from modeling_retro.loading import is_added
from modeling_retro.sharing import write_code

from .callbacks import BenchmarkCallback, StopOnSignal
from .checkpoints import checkpoint_to_resume, load_place, save_place
from .flops import step_flops
from .neighbor_corruption import check_batch_size, corrupt_neighbors
from .progress import Progress
from .settings import RetroTrainingArguments

logger = logging.getLogger(__name__)

RECENT_BATCHES = 8  # last training batches, on which the copy baseline's weight is chosen
NOTABLE_WAIT = 0.1  # share of the time above which waiting for neighbors is logged


class RetroTrainer(Trainer):
    """Trainer for RETRO models.

    An evaluation measures loss and bits per byte with neighbors on, off and shuffled, and for the
    copy baseline. The baseline's weight is chosen on the last training batches. Before any training
    step, the baseline is left out.

    Args:
        model: the model, or a PEFT model around it; None with `model_init`.
        args: [`RetroTrainingArguments`].
        data_collator: a [`data_retro.collator.RetroDataCollator`].
        train_dataset: packed sequences, or a [`PackedStream`] of this process' own documents.
        eval_dataset: packed sequences.
        processing_class: the tokenizer.
        model_init, compute_loss_func, callbacks, optimizers: as for `Trainer`.
        prefetch_batches: batches made ahead of the model, at least those of one update; 0: none.

    Raises:
        ValueError: the collator has another retrieval stride than the model.
    """

    args: RetroTrainingArguments
    model: torch.nn.Module

    def __init__(
        self,
        model: torch.nn.Module | None,
        args: RetroTrainingArguments,
        data_collator: Callable[[list[dict]], dict[str, torch.Tensor]],
        *,
        train_dataset: Dataset | PackedStream | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, LambdaLR | None] = (None, None),
        prefetch_batches: int = 0,
    ) -> None:
        self.bytes_of = byte_lengths(processing_class)
        self.prefetch_batches = prefetch_batches
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=_metrics,
        )
        stride, own = self.retro.config.retrieval_stride, getattr(data_collator, "retrieval_stride", None)
        if own not in (None, stride):
            raise ValueError(
                f"retrieval_stride is {stride} in the model and {own} in the collator. Give the collator the model's: "
                f"RetroDataCollator(retriever, {stride})."
            )
        self._stopper = StopOnSignal()
        self.add_callback(self._stopper)
        if (settings := self.args.benchmark_settings()) is not None:
            self.add_callback(BenchmarkCallback(self, settings))
        self._batches: Prefetcher | None = None
        self._source: Iterator | None = None  # the iterator that `_batches` reads
        self._sequences = 0  # sequences that this process has trained on
        self._place: list[int] = []  # the stream's state after them
        self._since = Progress()  # counts since the last log
        self._wait_is_logged = False
        self._recent: deque[dict[str, torch.Tensor]] = deque(maxlen=RECENT_BATCHES)
        self._copy_weight: float | None = None
        sizes = [(parameter.requires_grad, parameter.numel()) for parameter in self.model.parameters()]
        self._counts = {  # for the first log
            "parameters_trained": sum(size for is_trained, size in sizes if is_trained),
            "parameters_frozen": sum(size for is_trained, size in sizes if not is_trained),
        }

    @property
    def retro(self) -> RetroForCausalLM:
        """The RETRO model, without adapters around it."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def was_stopped(self) -> bool:
        """True if SIGTERM ended the training, with a checkpoint to continue from."""
        return self._stopper.stopped

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as `Trainer.train` does; a stream continues where the checkpoint was made.

        Raises:
            ValueError: the batch size is 1 and neighbors should be shuffled; there is no complete
                checkpoint; or it belongs to other data or another number of processes.
        """
        columns = getattr(self.train_dataset, "column_names", None) or ()
        if getattr(self.data_collator, "retriever", None) or "neighbor_ids" in columns:
            check_batch_size(self.args, self.retro.config)
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, str(self.args.output_dir))
        skip = self.args.ignore_data_skip
        if isinstance(self.train_dataset, PackedStream):
            # The stream resumes by itself. Trainer would build and discard all earlier batches.
            self.args.ignore_data_skip = True
            if checkpoint is not None:
                place = load_place(checkpoint, self.args.process_index, self.args.world_size)
                self.train_dataset.load_state(place)
        self._since, self._wait_is_logged = Progress(), False
        self._recent.clear()
        try:
            return super().train(checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.args.ignore_data_skip = skip
            self._stop_reading()

    # Batches: made ahead, counted and corrupted

    def get_train_dataloader(self) -> DataLoader:
        """Return the batches of packed sequences, or of this process' stream."""
        self._stop_reading()
        if not isinstance(self.train_dataset, PackedStream):
            return super().get_train_dataloader()
        self._sequences = 0
        # accelerate need not prepare this loader: the stream already belongs to this process. The
        # loader draws from a generator when it starts. With its own one, it leaves the random state
        # alone that a checkpoint has just restored.
        return DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            generator=torch.Generator(),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Return the batches of one update, made ahead, and count them."""
        if not self.prefetch_batches:
            started = time.perf_counter()
            samples = super().get_batch_samples(epoch_iterator, num_batches, device)
            self._since.waited += time.perf_counter() - started
        else:
            batches = self._prefetched(epoch_iterator, num_batches)
            before = batches.seconds_waited
            samples = super().get_batch_samples(batches, num_batches, device)
            self._since.waited += batches.seconds_waited - before
        if not self._recent:
            self._since = Progress()  # the clock starts when the first batches are there
        self._recent.extend(samples[0])
        for batch in samples[0]:
            self._sequences += len(batch["input_ids"])
            self._since.add(batch, self.retro.config.chunk_size, self.retro.config.retrieval_stride)
            if self.args.device_peak_tflops is not None:
                self._since.flops += step_flops(self.model, batch)
        if isinstance(self.train_dataset, PackedStream):
            self._place = self.train_dataset.state_after(self._sequences)
        return samples

    def _prefetched(self, epoch_iterator: Iterator, num_batches: int) -> Prefetcher:
        """Return the prefetcher of an epoch's batches."""
        if self._batches is None or self._source is not epoch_iterator:
            self._stop_reading()
            self._source = epoch_iterator
            # An update takes all its batches at once: those of the next one are made during it.
            self._batches = Prefetcher(epoch_iterator, max(self.prefetch_batches, num_batches))
        return self._batches

    def _stop_reading(self) -> None:
        """Stop the prefetcher, if there is one."""
        if self._batches is not None:
            self._batches.close()
        self._batches = self._source = None

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Corrupt some neighbors, then compute the loss and its gradients."""
        # Drawn here and not where batches are made ahead, so that checkpoints hold the random state
        # of the draws.
        inputs = corrupt_neighbors(inputs, self.args, self.retro.config)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute the loss as `Trainer` does, without logits unless something reads them."""
        if not return_outputs and self.label_smoother is None and self.compute_loss_func is None:
            inputs = {**inputs, "skip_logits": True}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    # The optimizer

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Return the names of the parameters with weight decay: matrices, but not match weights.

        Trainer finds biases by name, and a copy head has vectors of other names.
        """
        dimensions = {name: parameter.ndim for name, parameter in model.named_parameters(remove_duplicate=False)}
        names = super().get_decay_parameter_names(model)
        return [name for name in names if dimensions[name] > 1 and not name.endswith(".match")]

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Create Trainer's optimizer, with groups of their own for `retro_learning_rate`."""
        optimizer = super().create_optimizer(model)
        if self.args.retro_learning_rate is not None:
            named = (self.model if model is None else model).named_parameters()
            added = {id(parameter) for name, parameter in named if is_added(name)}
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if id(parameter) in added]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in added]
                if own:
                    optimizer.add_param_group({**group, "params": own, "lr": self.args.retro_learning_rate})
        return optimizer

    # Log and evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer` does, and add the progress numbers to those of training."""
        if "loss" in logs:
            logs |= self._since.numbers(self.args) | self._counts
            self._since, self._counts = Progress(), {}
            if logs["retrieval_wait"] > NOTABLE_WAIT and not self._wait_is_logged and self.is_world_process_zero():
                self._wait_is_logged = True
                logger.info(
                    "Training waits for batches %.0f %% of the time. If neighbors are fetched, a faster embedding "
                    "model or device, a Milvus server, a larger neighbor_cache_size or precompute_to would help.",
                    100 * logs["retrieval_wait"],
                )
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return each sequence's nats as logits and its sizes as labels: Trainer gathers both."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            config = self.retro.config
            nats, sizes = sequence_nats(
                model,
                inputs,
                config.chunk_size,
                self.bytes_of,
                copy_weight=self._copy_weight,
                retrieval_stride=config.retrieval_stride,
            )
        return None, nats, sizes

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Choose the copy baseline's weight, evaluate, and keep the results for the model card."""
        with self._since.paused():
            with self.compute_loss_context_manager():
                config = self.retro.config
                nats = weight_nats(
                    self.model_wrapped, self._recent, config.chunk_size, self.args.device, config.retrieval_stride
                )
            self._copy_weight = best_weight(self.accelerator.reduce(nats, "sum"))
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self.retro.evaluation = {
            name.removeprefix("eval_"): value
            for name, value in metrics.items()
            if "bits_per_byte" in name or "gain_over" in name
        }
        return metrics

    # Checkpoints: every process writes what it needs to continue before rank 0 writes
    # trainer_state.json last

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{self.state.global_step}"
        try:
            with self._since.paused():
                super()._save_checkpoint(model, trial)
        except Exception as error:  # on a full disk, torch raises RuntimeError, and safetensors an error of its own
            shutil.rmtree(folder, ignore_errors=True)  # a half-written checkpoint only fills the disk
            raise OSError(
                f"Could not write the checkpoint {folder} ({error}). It was removed; earlier checkpoints are complete. "
                "If the disk is full, free some space and resume with --resume_from_checkpoint true."
            ) from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if isinstance(self.train_dataset, PackedStream):
            save_place(output_dir, self._place, self.args.process_index, self.args.world_size)
        self.accelerator.wait_for_everyone()

    # The Hub

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:  # type: ignore[override]
        """Write RETRO's own card; it needs none of `Trainer`'s further arguments."""
        if self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            self.retro.model_card(self.hub_model_id or model_name or folder.name).save(folder / "README.md")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer pushes a checkpoint's weights and configuration from output_dir. The model's code
        # goes along.
        if self.is_world_process_zero():
            write_code(self.retro, str(self.args.output_dir))
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)


def _metrics(measured: EvalPrediction) -> dict[str, float]:
    """Compute an evaluation's numbers from the gathered nats and sizes of its sequences."""
    nats: Any = measured.predictions
    sizes: Any = measured.label_ids
    return Evaluation(nats, sizes).metrics()
