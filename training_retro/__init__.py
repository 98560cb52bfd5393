"""Training of RETRO models: settings, data and the trainer; `train_hf.py` puts them together."""

from .arguments import Arguments, DataArguments, ModelArguments, RetroTrainingArguments, parse_arguments
from .trainer import RetroTrainer

__all__ = [
    "Arguments",
    "DataArguments",
    "ModelArguments",
    "RetroTrainer",
    "RetroTrainingArguments",
    "parse_arguments",
]
