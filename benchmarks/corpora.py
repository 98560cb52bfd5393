"""Read real texts by document: sources and documentation that are on the machine."""

import gzip
import pydoc_data.topics
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import transformers
from machine import make_tokenizer
from transformers import PreTrainedTokenizerFast

from retrieval import BulkTokenizer, Document

KERNEL_DOCS = Path("/usr/share/doc/linux-doc-6.1/Documentation")  # Debian's package linux-doc-6.1
PERL = Path("/usr/share/perl")
MANUAL = Path("/usr/share/man")
TOKENIZER_DOCUMENTS = 1000  # documents that the tokenizer is trained on


def python() -> Iterator[Document]:
    """Yield the standard library's sources and the language reference."""
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        if "site-packages" not in file.parts and file.stat().st_size > 500 and "topics" not in file.name:
            yield Document(str(file.relative_to(library)), file.read_bytes().decode(errors="replace"))
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        yield Document(f"reference/{topic}", text)


def models() -> Iterator[Document]:
    """Yield the model sources inside the installed transformers package."""
    folder = Path(transformers.__file__).parent / "models"
    for file in sorted(folder.glob("*/modeling_*.py")):
        yield Document(file.name, file.read_text(encoding="utf-8"))


def kernel(folder: Path = KERNEL_DOCS) -> Iterator[Document]:
    """Yield the kernel's English documentation, without the near-identical descriptions of devices.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist. Install Debian's linux-doc-6.1, or name its folder.")
    files = [file for suffix in ("rst", "txt") for file in folder.rglob(f"*.{suffix}*")]
    for file in sorted(files):
        name = file.relative_to(folder)
        if not {"translations", "devicetree"} & set(name.parts):
            content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            yield Document(str(name), content.decode(errors="replace"))


def perl(folder: Path = PERL) -> Iterator[Document]:
    """Yield Perl's library and its manual, which Debian installs with perl-modules."""
    for file in sorted(file for suffix in ("pm", "pl", "pod") for file in folder.rglob(f"*.{suffix}")):
        yield Document(str(file.relative_to(folder)), file.read_bytes().decode(errors="replace"))


def manual(folder: Path = MANUAL) -> Iterator[Document]:
    """Yield the manual pages of programs, formats and concepts, in English, as they are written."""
    for file in sorted(folder.glob("man[1578]/*.gz")):
        if not file.is_symlink() and not file.name.startswith("perl"):
            yield Document(file.name, gzip.decompress(file.read_bytes()).decode(errors="replace"))


def by_name(kernel_docs: Path = KERNEL_DOCS) -> dict[str, Callable[[], Iterator[Document]]]:
    """Return the functions that make the corpora, by their short names."""
    sources = {"models": models, "python": python, "kernel": lambda: kernel(kernel_docs)}
    return sources | {"perl": perl, "manual": manual}


def write(documents: Iterator[Document], folder: Path, chunks: int, chunk_size: int) -> PreTrainedTokenizerFast:
    """Write train/, held_out/ and tokenizer/ to a folder, a tenth of the documents held out.

    The tokenizer is a byte-level BPE like GPT-2's, trained on documents that are not held out.

    Args:
        chunks: stop after documents of this many chunks in all.
        chunk_size: tokens in a chunk.
    """
    drawn = [document for document in documents if document.text.strip()]
    random.Random(0).shuffle(drawn)
    texts = [document.text for number, document in enumerate(drawn) if number % 10][:TOKENIZER_DOCUMENTS]
    tokenizer = make_tokenizer(texts)
    tokenizer.save_pretrained(folder / "tokenizer")
    bulk, total = BulkTokenizer(tokenizer), 0
    for number, document in enumerate(drawn):
        part = folder / ("train" if number % 10 else "held_out")
        part.mkdir(exist_ok=True)
        (part / f"{document.id.replace('/', '_').removesuffix('.gz')}.txt").write_text(document.text, encoding="utf-8")
        total += len(bulk.encode_batch([document.text])[0]) // chunk_size + 1
        if total >= chunks:
            break
    return tokenizer
