"""Training of RETRO models: settings, assembly of a run, and the trainer behind `train_hf.py`."""

from .assembly import build_trainer
from .running import run_training, store_neighbors
from .settings import Arguments, DataArguments, ModelArguments, RetroTrainingArguments, parse_arguments
from .stored_states import fit_reader
from .trainer import RetroTrainer

__all__ = [
    "Arguments",
    "DataArguments",
    "ModelArguments",
    "RetroTrainer",
    "RetroTrainingArguments",
    "build_trainer",
    "fit_reader",
    "parse_arguments",
    "run_training",
    "store_neighbors",
]
