"""Training of RETRO models: settings, data and the trainer; `train_hf.py` is its door."""

from .arguments import Arguments, DataArguments, ModelArguments, RetroTrainingArguments, parse_arguments
from .assembly import build_trainer, store_neighbors
from .trainer import RetroTrainer

__all__ = [
    "Arguments",
    "DataArguments",
    "ModelArguments",
    "RetroTrainer",
    "RetroTrainingArguments",
    "build_trainer",
    "parse_arguments",
    "store_neighbors",
]
