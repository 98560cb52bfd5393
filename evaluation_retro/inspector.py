"""Show what a model reads and what each neighbor changes, as a page or as one HTML file.

    retro-eval inspect --model runs/retrofit --knowledge_base kb.db
    retro-eval inspect --model runs/retrofit --knowledge_base kb.db --prompt "…" --export read.html

The page lets documents be added, changed and removed. The file needs no server and no network.
"""

import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path

from .inspection import inspect_generation, inspect_text
from .inspection_page import build_page, launch, static_page
from .opening import ModelSettings, open_model

FILE_PREFIX = "FILE:"  # of a text that names a file


@dataclass
class InspectSettings(ModelSettings):
    """The settings of `retro-eval inspect`."""

    prompt: str = field(default="", metadata={"help": f"Text to continue, or {FILE_PREFIX}path."})
    text: str = field(
        default="",
        metadata={"help": f"With export: a text to read instead of generating one, or {FILE_PREFIX}path."},
    )
    new_tokens: int = field(default=64, metadata={"help": "Tokens to write at most."})
    temperature: float = field(default=0.0, metadata={"help": "0: always take the likeliest token."})
    export: str | None = field(
        default=None, metadata={"help": "Write a static page to this file and exit. No server is started."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on. By default this machine alone."})
    port: int | None = field(default=None, metadata={"help": "Port. By default the first free one from 7860."})

    def __post_init__(self) -> None:
        if self.export is None and self.text:
            raise ValueError("text is for a static page. Name its file with --export, or give a --prompt.")
        if self.export is not None and bool(self.text) == bool(self.prompt):
            raise ValueError("export needs a --prompt to continue or a --text to read; one of the two.")
        for name in ("prompt", "text"):
            value = getattr(self, name)
            if value.startswith(FILE_PREFIX):
                setattr(self, name, Path(value.removeprefix(FILE_PREFIX)).read_text(encoding="utf-8"))


SETTINGS = InspectSettings


def run(settings: InspectSettings) -> None:
    """Write the static page, or serve the page until it is interrupted."""
    if settings.export is None:
        check_gradio()
    elif not Path(settings.export).absolute().parent.is_dir():
        raise ValueError(f"Cannot write {settings.export}: its folder does not exist. Make it first.")
    opened = open_model(settings)
    try:
        if settings.export is None:
            page = build_page(opened, settings.new_tokens, settings.temperature, settings.prompt)
            print("Starting the inspector. Press Ctrl-C to stop it.", flush=True)
            address = launch(page, settings.host, settings.port, block=False)
            print(f"Open {address}", flush=True)
            page.block_thread()
            return
        if settings.text:
            inspection = inspect_text(opened, settings.text)
        else:
            inspection = inspect_generation(opened, settings.prompt, settings.new_tokens, settings.temperature)
        Path(settings.export).write_text(static_page(inspection), encoding="utf-8")
        print(f"Wrote {settings.export}. It needs no server.")
    finally:
        opened.close()


def check_gradio() -> None:
    """Switch Gradio's telemetry off before it is imported.

    Raises:
        ValueError: Gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(
            "The page needs Gradio, which is not installed. Run `pip install 'transformers-retro[inspect]'`, or write "
            "a static page with --export."
        )
