"""RetroTrainer: Trainer that retrieves ahead, drops neighbors, resumes streams exactly, and measures on, off and shuffled."""

import json
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer

from data_retro.packing import PackedStream
from data_retro.prefetch import Prefetcher
from evaluation_retro import Evaluation, best_weight, byte_lengths, sequence_nats, weight_nats
from modeling_retro.loading import is_added
from modeling_retro.sharing import write_code

from .arguments import RetroTrainingArguments
from .callbacks import BenchmarkCallback, StopOnSignal
from .flops import step_flops
from .neighbor_corruption import check_batch_size, corrupt_neighbors
from .progress import Progress

logger = logging.getLogger(__name__)

RECENT_BATCHES = 8  # of training, on which the copy baseline's weight is chosen
WAITING = 0.1  # share of the time from which on waiting for neighbors is worth a word


class RetroTrainer(Trainer):
    """Trainer for RETRO models; its evaluation measures loss and bits-per-byte with neighbors on, off and shuffled, and the
    copy baseline, whose weight is chosen on the last batches that were trained on (not before there are any).

    Args:
        args: [`RetroTrainingArguments`].
        processing_class: the tokenizer.
        data_collator: a [`data_retro.collator.RetroDataCollator`].
        train_dataset: packed sequences, or a [`PackedStream`] of this process' own documents.
        prefetch_batches: batches made ahead of the model, at least those of one update; 0: none.
        **kwargs: as for `Trainer`.
    """

    args: RetroTrainingArguments

    def __init__(self, *args, processing_class: PreTrainedTokenizerBase, prefetch_batches: int = 0, **kwargs):
        self.bytes_of = byte_lengths(processing_class)
        self.prefetch_batches = prefetch_batches
        super().__init__(
            *args,
            processing_class=processing_class,
            compute_metrics=lambda measured: Evaluation(measured.predictions, measured.label_ids).metrics(),
            **kwargs,
        )
        self._stopper = StopOnSignal()
        self.add_callback(self._stopper)
        if (settings := self.args.benchmark_settings()) is not None:
            self.add_callback(BenchmarkCallback(self, settings))
        self._batches: Prefetcher | None = None
        self._source: Iterator | None = None  # what `_batches` reads
        self._sequences = 0  # that this process has trained on
        self._place: list[int] = []  # of a stream, after them
        self._since = Progress()  # the last log
        self._recent: deque[dict[str, torch.Tensor]] = deque(maxlen=RECENT_BATCHES)
        self._copy_weight: float | None = None
        sizes = [(parameter.requires_grad, parameter.numel()) for parameter in self.model.parameters()]
        self._counts = {  # for the first log
            "parameters_trained": sum(size for is_trained, size in sizes if is_trained),
            "parameters_frozen": sum(size for is_trained, size in sizes if not is_trained),
        }

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """`Trainer.train`; a stream goes on where the checkpoint was made.

        Raises:
            ValueError: bad neighbors are to be shown in batches of one sequence.
        """
        columns = getattr(self.train_dataset, "column_names", None) or ()
        if getattr(self.data_collator, "retriever", None) or "neighbor_ids" in columns:
            check_batch_size(self.args, self.model.config)
        skip = self.args.ignore_data_skip
        if isinstance(self.train_dataset, PackedStream):
            # a stream finds its place by itself; Trainer would make all batches before it, to throw them away
            self.args.ignore_data_skip = True
            if resume_from_checkpoint is not None:
                self.train_dataset.load_state(self._load_place(resume_from_checkpoint))
        self._since = Progress()
        self._recent.clear()
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.args.ignore_data_skip = skip
            self._stop_reading()

    @property
    def was_stopped(self) -> bool:
        """True if SIGTERM ended the training, with a checkpoint to go on from."""
        return self._stopper.stopped

    def get_train_dataloader(self) -> DataLoader:
        self._stop_reading()
        if not isinstance(self.train_dataset, PackedStream):
            return super().get_train_dataloader()
        self._sequences = 0
        # Not prepared by accelerate: the stream is this process' own already. A generator of its own: the loader draws
        # from it when it starts, and would otherwise draw from the one whose state a checkpoint has just restored.
        return DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            generator=torch.Generator(),
        )

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The batches of one update, made ahead."""
        if not self.prefetch_batches:
            started = time.perf_counter()
            samples = super().get_batch_samples(epoch_iterator, num_batches, device)
            self._since.waited += time.perf_counter() - started
        else:
            if self._source is not epoch_iterator:
                self._stop_reading()
                self._source = epoch_iterator
                # an update takes its batches all at once: those of the next one must fit in while the model computes
                self._batches = Prefetcher(epoch_iterator, max(self.prefetch_batches, num_batches))
            before = self._batches.seconds_waited
            samples = super().get_batch_samples(self._batches, num_batches, device)
            self._since.waited += self._batches.seconds_waited - before
        if not self._recent:
            self._since = Progress()  # the clock starts when the first batches are there
        self._recent.extend(samples[0])
        for batch in samples[0]:
            self._sequences += len(batch["input_ids"])
            self._since.add(batch, self.model.config.chunk_size)
            if self.args.device_peak_tflops is not None:
                self._since.flops += step_flops(self.model, batch)
        if isinstance(self.train_dataset, PackedStream):
            self._place = self.train_dataset.state_after(self._sequences)
        return samples

    def _stop_reading(self) -> None:
        if self._batches is not None:
            self._batches.close()
        self._batches = self._source = None

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args, **kwargs) -> torch.Tensor:
        # drawn here and not where batches are made ahead, so that checkpoints hold the state of the draws
        inputs = corrupt_neighbors(inputs, self.args, self.model.config)
        return super().training_step(model, inputs, *args, **kwargs)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Matrices alone: a copy head has vectors that are no biases by name, and matches are weighed by a few per head."""
        dimensions = {name: parameter.ndim for name, parameter in model.named_parameters(remove_duplicate=False)}
        names = super().get_decay_parameter_names(model)
        return [name for name in names if dimensions[name] > 1 and not name.endswith(".match")]

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Trainer's: decay for matrices alone; with `retro_learning_rate`, groups of their own for what RETRO adds."""
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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._since.numbers(self.args) | self._counts
            self._since, self._counts = Progress(), {}
            if logs["retrieval_wait"] > WAITING and self.is_world_process_zero():
                logger.info(
                    "Retrieval is the limit: %.0f %% of the time goes to waiting for batches. A faster embedding model or "
                    "device, a server, more cache or precompute_to would help.",
                    100 * logs["retrieval_wait"],
                )
        super().log(logs, start_time)

    # What a run needs to go on exactly, written by every process before rank 0 writes trainer_state.json, the last file

    def _save_checkpoint(self, *args, **kwargs) -> None:
        folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{self.state.global_step}"
        try:
            with self._since.paused():
                super()._save_checkpoint(*args, **kwargs)
        except Exception as error:  # of a full disk, torch says it with RuntimeError, safetensors with its own
            shutil.rmtree(folder, ignore_errors=True)  # what is half-written would only fill the disk
            raise OSError(
                f"The checkpoint {folder} could not be written ({error}); it was removed, earlier ones are whole. If the disk is "
                "full, free some space; then resume with --resume_from_checkpoint true."
            ) from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if isinstance(self.train_dataset, PackedStream):
            saved = {"place": self._place, "processes": self.args.world_size}
            self._place_file(output_dir).write_text(json.dumps(saved))
        self.accelerator.wait_for_everyone()

    def _place_file(self, folder: str | os.PathLike) -> Path:
        return Path(folder) / f"data_place_{self.args.process_index}.json"

    def _load_place(self, checkpoint: str) -> list[int]:
        file = self._place_file(checkpoint)
        if not file.is_file():
            raise ValueError(
                f"{checkpoint} does not say where process {self.args.process_index} goes on in the stream: it was made with "
                "other data, or by fewer processes."
            )
        saved = json.loads(file.read_text())
        if saved["processes"] != self.args.world_size:
            raise ValueError(
                f"{checkpoint} was made by {saved['processes']} processes that shared the stream, this run has "
                f"{self.args.world_size}: resume with as many."
            )
        return saved["place"]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Each sequence's nats in the place of logits, its sizes in that of labels: Trainer gathers both."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            nats, sizes = sequence_nats(
                model, inputs, self.model.config.chunk_size, self.bytes_of, copy_weight=self._copy_weight
            )
        return None, nats, sizes

    def evaluate(self, *args, **kwargs):
        with self._since.paused():
            with self.compute_loss_context_manager():
                nats = weight_nats(self.model_wrapped, self._recent, self.model.config.chunk_size, self.args.device)
            self._copy_weight = best_weight(self.accelerator.reduce(nats, "sum"))
            metrics = super().evaluate(*args, **kwargs)
        measured = ("bits_per_byte", "gain_over")
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # under PEFT's
        model.evaluation = {
            name.removeprefix("eval_"): value
            for name, value in metrics.items()
            if any(part in name for part in measured)
        }
        return metrics

    def create_model_card(self, model_name: str | None = None, **kwargs) -> None:
        """RETRO's own card: base model, knowledge base, evaluation."""
        if self.is_world_process_zero():
            name = self.hub_model_id or model_name or Path(self.args.output_dir).name
            self.model.model_card(name).save(Path(self.args.output_dir) / "README.md")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer pushes a checkpoint's weights and configuration from output_dir; the code that opens them goes along
        if self.is_world_process_zero():
            write_code(self.model, self.args.output_dir)
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir=None, state_dict=None):
        """Trainer pickles its arguments beside the weights; a checkpoint that is shared must not hold a token."""
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
