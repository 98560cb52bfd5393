"""The command line `retro-eval`, also `python -m evaluation_retro`."""

import sys
from importlib import import_module

from retrieval import KnowledgeBaseError
from retrieval.parsing import parse_settings
from retrieval.quiet import quiet_program

# Each command with its module, which has SETTINGS (a dataclass) and run(settings).
COMMANDS = {
    "perplexity": "evaluation_retro.perplexity",
    "compare": "evaluation_retro.compare",
    "leakage": "evaluation_retro.leakage",
    "facts": "evaluation_retro.facts",
    "ablate": "evaluation_retro.ablate",
    "benchmarks": "evaluation_retro.benchmark_command",
    "inspect": "evaluation_retro.inspector",
}
PROGRAM = "retro-eval"
INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended


def usage() -> str:
    """Return the list of commands."""
    lines = [f"usage: {PROGRAM} COMMAND [config.yaml] [--name value ...]", ""]
    for command, module in COMMANDS.items():
        lines.append(f"  {command:<12} {(import_module(module).__doc__ or '').partition(chr(10))[0]}")
    return "\n".join([*lines, "", f"{PROGRAM} COMMAND --help lists the settings of a command."])


def main(argv: list[str] | None = None) -> None:
    """Run one command. Wrong settings and bad input end the program with a message."""
    quiet_program()
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    command, *rest = argv
    if command not in COMMANDS:
        sys.exit(f"{PROGRAM}: there is no command {command!r}. Choose one of {', '.join(COMMANDS)}.")
    module = import_module(COMMANDS[command])
    (settings,) = parse_settings((module.SETTINGS,), f"{PROGRAM} {command}", rest, lambda settings: None)
    try:
        module.run(settings)
    except (KnowledgeBaseError, ValueError, OSError) as error:
        sys.exit(f"{PROGRAM} {command}: {error}")
    except KeyboardInterrupt:
        print("\nInterrupted. The finished parts are kept: run the same command again to go on.", file=sys.stderr)
        sys.exit(INTERRUPTED)
