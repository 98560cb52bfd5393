"""Start training runs."""

import json

import training_retro

from .training_world import CHUNK

OVERRIDES = (
    f"{{n_layer: 3, n_embd: 32, n_head: 2, n_positions: 64, chunk_size: {CHUNK}, cca_layers: [1], embd_pdrop: 0.0}}"
)


def flags(world, tokenizer_folder, output_dir, **changes):
    settings = {
        "tokenizer_name": tokenizer_folder,
        "config_overrides": OVERRIDES,
        "train_data": world / "train",
        "validation_data": world / "held_out",
        "output_dir": output_dir,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": "5e-3",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": "true",
        "disable_tqdm": "true",
    } | changes
    return [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]


def knowledge_base(world):
    return {"knowledge_base": world / "kb.db", "collection_name": "texts", "embedding_model": world / "embedding"}


def train(arguments, cache_dir):
    trainer = training_retro.build_trainer(*(parsed := training_retro.parse_arguments(arguments)), cache_dir)
    trainer.train(resume_from_checkpoint=parsed[2].resume_from_checkpoint)
    if trainer.model.retriever is not None:
        trainer.model.retriever.close()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def yaml_flags(path, arguments, **settings):
    """Write settings that flags cannot express to a file; return the whole command line."""
    path.write_text(json.dumps(settings))  # JSON is YAML
    return [str(path), *arguments]
