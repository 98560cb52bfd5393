r"""Train RETRO with `Trainer`: from scratch, from GPT-2 or RETRO weights, or resumed.

    python train_hf.py examples/train_local.yaml --learning_rate 1e-3
    accelerate launch train_hf.py --model_name_or_path gpt2 --freeze_backbone true \
        --train_data texts/ --knowledge_base kb.db

Settings are flags, or one YAML file of the same names, or both; flags win. Neighbors are fetched
during training. Without a knowledge base, only the decoder is trained. It can be RETROfitted later.
"""

import logging
import sys
import tempfile

from retrieval import KnowledgeBaseError
from retrieval.quiet import quiet_program
from training_retro import build_trainer, parse_arguments, run_training


def main(argv: list[str] | None = None) -> None:
    """Run `retro-train`: train, save the model and its tokenizer in output_dir, and evaluate."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("training_retro").setLevel(logging.INFO)
    quiet_program()
    model, data, training = parse_arguments(argv)
    with tempfile.TemporaryDirectory(prefix="retro-train-") as cache_dir:
        try:
            trainer = build_trainer(model, data, training, cache_dir)
        except (KnowledgeBaseError, ValueError, OSError) as error:
            sys.exit(f"train_hf.py: error: {error}")
        run_training(trainer, data)


if __name__ == "__main__":
    main()
