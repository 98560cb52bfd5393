"""Run `retro-eval` as `python -m evaluation_retro`."""

from .cli import main

if __name__ == "__main__":
    main()
