"""Sample from a RETRO model, and show which documents each chunk read.

    python generate_hf.py --model runs/local --knowledge_base kb.db --prompt "Chunked attention"
    python generate_hf.py --model gpt2 --prompt FILE:prompt.txt --temperature 0

Without a knowledge base, the decoder writes alone.
"""

from retrieval import KnowledgeBaseError
from retrieval.parsing import make_parser
from retrieval.quiet import quiet_program
from training_retro.sampling import GenerateArguments, Likeliest, describe, likeliest_tokens, load, sample


def main(argv: list[str] | None = None) -> None:
    """Run `retro-generate`: print samples. Wrong settings end the program with a message."""
    quiet_program()
    parser = make_parser(GenerateArguments, "generate_hf.py")
    try:
        (arguments,) = parser.parse_args_into_dataclasses(argv)
        model, tokenizer = load(arguments)
        outputs = sample(model, tokenizer, arguments)
        likeliest: list[dict[int, Likeliest]] = [{}] * arguments.num_samples
        if arguments.show_likeliest:
            likeliest = likeliest_tokens(model, outputs, arguments.show_likeliest)
    except (KnowledgeBaseError, ValueError, OSError) as error:
        parser.error(str(error))
    samples = zip(outputs.sequences.tolist(), outputs.retrieved, likeliest, strict=True)
    for number, (row, retrieved, tokens) in enumerate(samples, 1):
        print(f"=== sample {number} of {arguments.num_samples} ===")
        print(describe(row, retrieved, tokenizer, tokens), end="\n\n")


if __name__ == "__main__":
    main()
