"""Sample from a RETRO model, and show which documents it read for each chunk. The sampling twin of train_hf.py.

    python generate_hf.py --model runs/local --knowledge_base kb.db --prompt "Chunked cross-attention" --num_samples 2
    python generate_hf.py --model gpt2 --prompt FILE:prompt.txt --temperature 0

Without a knowledge base it is plain GPT-2 generation.
"""

from transformers import HfArgumentParser

from retrieval import KnowledgeBaseError
from retrieval.quiet import quiet_program
from training_retro.sampling import GenerateArguments, describe, load, sample


def main(argv: list[str] | None = None) -> None:
    """Entry point of `retro-generate`: print the samples. Ends the program with a message if settings make no sense."""
    quiet_program()
    parser = HfArgumentParser(GenerateArguments, prog="generate_hf.py", allow_abbrev=False)
    try:
        (arguments,) = parser.parse_args_into_dataclasses(argv)
        model, tokenizer = load(arguments)
        outputs = sample(model, tokenizer, arguments)
    except (KnowledgeBaseError, ValueError, OSError) as error:
        parser.error(str(error))
    for number, (row, retrieved) in enumerate(zip(outputs.sequences.tolist(), outputs.retrieved, strict=True), 1):
        print(f"=== sample {number} of {arguments.num_samples} ===")
        print(describe(row, retrieved, tokenizer, model.config.chunk_size), end="\n\n")


if __name__ == "__main__":
    main()
