"""The inspector's page: one HTML file with its style, script and data, and its host in Gradio."""

import html
import json
import threading
from collections.abc import Callable
from importlib import resources
from typing import Any

from retrieval import Document, KnowledgeBaseError, ingest

from .inspection import Inspection, inspect_generation
from .opening import Opened

FRAME_STYLE = "width: 100%; height: 85vh; min-height: 30rem; border: 0"
EMPTY = "Write a prompt and choose Generate."
CSS = """
footer { display: none !important }
.gradio-container { width: 100%; max-width: 84rem !important; margin: 0 auto !important }
#view .html-container { padding: 0 }
"""


def static_page(inspection: Inspection) -> str:
    """Return the page of an inspection. It needs no server and asks for nothing else."""
    # `<` as an escape: no text can end the script element that holds the data
    data = json.dumps(inspection.as_json(), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    page = _file("inspection.html")
    for mark, content in (("STYLE", _file("inspection.css")), ("SCRIPT", _file("inspection.js"))):
        page = page.replace(f"/*{mark}*/", content)
    return page.replace("/*DATA*/", data)


def framed(page: str) -> str:
    """Return a page as a frame of another one; the frame runs the page's own script."""
    return f'<iframe title="What the model read" srcdoc="{html.escape(page)}" style="{FRAME_STYLE}"></iframe>'


def _file(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


class Inspector:
    """Answers the page's buttons, one after the other.

    Each method returns what the page shows, and a sentence on what was done or what went wrong.

    Args:
        opened: a model with its knowledge base.
    """

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self._lock = threading.Lock()

    def generate(self, prompt: str, new_tokens: float, temperature: float) -> tuple[str, str]:
        """Continue the prompt. Returns the frame (empty after an error) and a sentence."""

        def write() -> tuple[str, str]:
            shown = inspect_generation(self.opened, prompt, int(new_tokens or 0), float(temperature or 0))
            written = len(shown.tokens) - shown.prompt_length
            return framed(static_page(shown)), f"Wrote {written} tokens."

        return self._answer(write, lambda sentence: ("", sentence))

    def put(self, doc_id: str, text: str) -> str:
        """Add a document to the knowledge base, or replace the one that has this id."""

        def write() -> str:
            if not text.strip():
                raise ValueError("The document has no text. Write one, or choose Remove.")
            retriever = self.retriever
            report = ingest(
                [Document(doc_id, text)],
                retriever.store,
                retriever.tokenizer,
                retriever.embedder,
                chunk_size=retriever.chunk_size,
            )
            return f"The knowledge base now has {doc_id!r}: {report.chunks_written} chunks written. Generate again."

        return self._answer(write, str)

    def remove(self, doc_id: str) -> str:
        """Remove a document from the knowledge base."""

        def delete() -> str:
            deleted = self.retriever.store.delete_documents([doc_id])
            if not deleted:
                return f"The knowledge base has no document {doc_id!r}."
            return f"Removed {doc_id!r}: {deleted} chunks. Generate again."

        return self._answer(delete, str)

    @property
    def retriever(self) -> Any:
        """The knowledge base."""
        assert self.opened.retriever is not None, "opened with a knowledge base"
        return self.opened.retriever

    def _answer(self, act: Callable[[], Any], failed: Callable[[str], Any]) -> Any:
        with self._lock:
            try:
                return act()
            except (ValueError, KnowledgeBaseError) as error:
                return failed(str(error))


def build_page(opened: Opened, new_tokens: int, temperature: float, prompt: str = "") -> Any:
    """Return the page as `gradio.Blocks`. All text goes through fields that show it as text."""
    import gradio as gr

    inspector = Inspector(opened)
    with gr.Blocks(title="RETRO inspector", analytics_enabled=False) as page:
        prompted = gr.Textbox(prompt, label="Prompt", lines=4, max_lines=8, elem_id="prompt")
        with gr.Row(equal_height=True):
            count = gr.Number(new_tokens, label="New tokens", precision=0, minimum=1, elem_id="new_tokens")
            heat = gr.Number(temperature, label="Temperature", minimum=0, step=0.1, elem_id="temperature")
            generate = gr.Button("Generate", variant="primary", elem_id="generate")
        said = gr.Textbox(EMPTY, show_label=False, interactive=False, container=False, elem_id="said")
        view = gr.HTML(elem_id="view", padding=False)
        with gr.Accordion("Knowledge base", open=False, elem_id="knowledge_base"):
            doc_id = gr.Textbox(label="Document id", elem_id="doc_id")
            text = gr.Textbox(label="Text", lines=5, elem_id="doc_text")
            with gr.Row():
                put = gr.Button("Add or change", elem_id="put")
                remove = gr.Button("Remove", elem_id="remove")
            changed = gr.Textbox(show_label=False, interactive=False, container=False, elem_id="changed")
        generate.click(inspector.generate, [prompted, count, heat], [view, said], api_visibility="private")
        put.click(inspector.put, [doc_id, text], changed, api_visibility="private")
        remove.click(inspector.remove, doc_id, changed, api_visibility="private")
    return page.queue(default_concurrency_limit=1)


def launch(page: Any, host: str, port: int | None, block: bool = True) -> str:
    """Serve the page, and return its address. Fonts are the system's; nothing is shared."""
    import gradio as gr

    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not block,
        share=False,
        quiet=True,
        css=CSS,
        footer_links=[],
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )
    return str(address)
