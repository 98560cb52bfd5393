"""Run a training run from its first step to the saved and evaluated model."""

from data_retro.precomputed import precompute, requirements_of
from retrieval import MilvusRetriever

from .settings import DataArguments
from .trainer import RetroTrainer


def run_training(trainer: RetroTrainer, data: DataArguments) -> None:
    """Train, save the model and its tokenizer in output_dir, and evaluate.

    The model card is written, or pushed with the model. With `precompute_to`, only the neighbors
    are stored; with `eval_only`, the model is only evaluated. A run that SIGTERM stops ends after
    its checkpoint. The knowledge base is closed at the end.
    """
    try:
        if data.precompute_to is not None:
            store_neighbors(trainer, data)
        else:
            if trainer.args.eval_only:
                _evaluate(trainer)
            else:
                _train(trainer)
            # One process may serve the knowledge base to the others.
            trainer.accelerator.wait_for_everyone()
    finally:
        retriever = trainer.retro.retriever
        if isinstance(retriever, MilvusRetriever):
            retriever.close()


def _train(trainer: RetroTrainer) -> None:
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    if trainer.was_stopped:  # little time may be left, and the checkpoint is saved
        return
    trainer.save_model()
    trainer.save_state()
    if trainer.eval_dataset is not None:
        _evaluate(trainer)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(commit_message="Trained and evaluated")  # writes the card, too
    else:
        trainer.create_model_card()


def _evaluate(trainer: RetroTrainer) -> None:
    """Evaluate, print the numbers, and save them in output_dir as eval_results.json."""
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def store_neighbors(trainer: RetroTrainer, data: DataArguments) -> None:
    """Store the neighbors of all sequences in the folder `precompute_to`.

    Raises:
        ValueError: the settings name no folder, or the model has no knowledge base.
        FileExistsError: the folder exists.
    """
    config, retriever = trainer.retro.config, trainer.retro.retriever
    if data.precompute_to is None or not isinstance(retriever, MilvusRetriever):
        raise ValueError("Storing neighbors needs precompute_to and a knowledge_base. Give both.")
    parts = {"train": trainer.train_dataset}
    if trainer.eval_dataset is not None:
        parts["validation"] = trainer.eval_dataset
    first_points = data.first_points(config, trainer.args.seed)
    requirements = requirements_of(retriever.tokenizer, config, data.sequence_length(config), first_points)
    precompute(parts, retriever, requirements, data.precompute_to)
