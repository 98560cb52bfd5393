"""The command line `retro-lm-eval`: lm-eval's own, with the model `retro`.

lm-eval loads no models from other packages by itself. This program registers RETRO's and hands over
to lm-eval's command line unchanged.
"""

import sys

from retrieval import KnowledgeBaseError

PROGRAM = "retro-lm-eval"


def main() -> None:
    """Run lm-eval's command line. Bad input, or no lm-eval, ends the program with a message."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        sys.exit(f"{PROGRAM} needs lm-eval. Install it: pip install lm-eval")
    from . import lm_eval_model  # noqa: F401  # registers the model

    try:
        cli_evaluate()
    except (KnowledgeBaseError, ValueError, OSError) as error:
        sys.exit(f"{PROGRAM}: {error}")


if __name__ == "__main__":
    main()
