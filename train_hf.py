"""Train RETRO with `Trainer`: from scratch, from GPT-2 or RETRO weights, as a RETROfit, or resumed.

    python train_hf.py examples/train_local.yaml --learning_rate 1e-3
    accelerate launch train_hf.py --model_name_or_path gpt2 --freeze_backbone --train_data texts/ --knowledge_base kb.db

Settings are flags, or one YAML file of the same names, or both: flags win. Neighbors are fetched while training. Without
a knowledge base only the GPT-2 decoder is trained, which can be RETROfitted later.
"""

import logging
import sys
import tempfile

from retrieval import KnowledgeBaseError
from retrieval.quiet import quiet_program
from training_retro import build_trainer, parse_arguments, store_neighbors


def main(argv: list[str] | None = None) -> None:
    """Entry point of `retro-train`: train, save the model and its tokenizer in output_dir, and evaluate them."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("training_retro").setLevel(logging.INFO)
    quiet_program()
    model_arguments, data, training = parse_arguments(argv)
    with tempfile.TemporaryDirectory(prefix="retro-train-") as cache_dir:
        try:
            trainer = build_trainer(model_arguments, data, training, cache_dir)
        except (KnowledgeBaseError, ValueError, OSError) as error:
            sys.exit(f"train_hf.py: error: {error}")
        try:
            if data.precompute_to is not None:
                store_neighbors(trainer, data)
                return
            trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
            if trainer.was_stopped:  # there may be little time left, and a checkpoint is saved
                trainer.accelerator.wait_for_everyone()
                return
            trainer.save_model()
            trainer.save_state()
            if trainer.eval_dataset is not None:
                metrics = trainer.evaluate()
                trainer.log_metrics("eval", metrics)
                trainer.save_metrics("eval", metrics)
            if training.push_to_hub:
                trainer.push_to_hub(commit_message="Trained and evaluated")  # writes the card, too
            else:
                trainer.create_model_card()
            trainer.accelerator.wait_for_everyone()  # a process may serve the knowledge base to the others
        finally:
            if trainer.model.retriever is not None:
                trainer.model.retriever.close()


if __name__ == "__main__":
    main()
