"""The knowledge base on the command line: ingest, search, info (`python -m retrieval`, `retro-kb`)."""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .chunking import Document, check_chunk_size
from .embedding import DEFAULT_EMBEDDING_MODEL, Embedder
from .errors import KnowledgeBaseError
from .ingestion import ingest
from .retriever import MilvusRetriever
from .sources import read_documents
from .store import MilvusStore
from .tokenization import BulkTokenizer

console = Console(highlight=False)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m retrieval", description="A RETRO knowledge base in Milvus.")
    commands = parser.add_subparsers(dest="command", required=True)
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument("--uri", help="Milvus Lite file (.db) or http(s)://host:port; default: MILVUS_URI")
    place.add_argument("--collection-name", default="retro")
    models = argparse.ArgumentParser(add_help=False)
    models.add_argument("--tokenizer", help="name or folder of the model's tokenizer")
    models.add_argument("--embedding-model", help="name or folder of a sentence-transformers model")
    models.add_argument("--device", help="where the embedding model runs; default: the best there is")

    add = commands.add_parser("ingest", parents=[place, models], help="bring documents into the knowledge base")
    add.add_argument("sources", nargs="+", help="text files, folders, .jsonl files, names of datasets")
    add.add_argument("--text-field", default="text", help="of a JSONL line or dataset row")
    add.add_argument("--doc-id-field", help="of a JSONL line or dataset row; default: source and number")
    add.add_argument("--chunk-size", type=int, default=64, help="tokens in a chunk (default: 64)")
    add.set_defaults(run=run_ingest)

    find = commands.add_parser("search", parents=[place, models], help="show the neighbors of a text")
    find.add_argument("query")
    find.add_argument("-k", "--num-neighbors", type=int, default=2)
    find.set_defaults(run=run_search)

    info = commands.add_parser("info", parents=[place], help="show identity and size")
    info.set_defaults(run=run_info)
    return parser


def run_ingest(arguments: argparse.Namespace) -> None:
    check_chunk_size(arguments.chunk_size)
    if arguments.tokenizer is None:
        raise ValueError("--tokenizer is needed: the tokenizer of the model that will read the knowledge base.")
    tokenizer = BulkTokenizer(_tokenizer(arguments.tokenizer))
    embedder = Embedder(arguments.embedding_model or DEFAULT_EMBEDDING_MODEL, device=arguments.device)
    documents = _documents(arguments)
    store = MilvusStore(arguments.uri, arguments.collection_name)
    report = ingest(documents, store, tokenizer, embedder, chunk_size=arguments.chunk_size, progress=True)
    _print_table(dataclasses.asdict(report) | {"seconds": f"{report.seconds:.1f}", "chunks in all": store.count()})


def _documents(arguments: argparse.Namespace) -> Iterator[Document]:
    """The documents of all sources; two sources may not have the same id, or one would replace the other in silence."""
    earlier: set[str] = set()
    for place, source in enumerate(arguments.sources, 1):
        last, here = place == len(arguments.sources), set()
        for document in read_documents(source, arguments.text_field, arguments.doc_id_field):
            if document.id in earlier:
                raise ValueError(
                    f"Document {document.id!r} of {source} has the id of one in an earlier source and would replace it. "
                    "Ingest a folder that holds both, or name the field with their ids with --doc-id-field."
                )
            if not last:
                here.add(document.id)
            yield document
        earlier |= here


def run_search(arguments: argparse.Namespace) -> None:
    store = MilvusStore.open(arguments.uri, arguments.collection_name)
    identity = store.identity()
    tokenizer = _tokenizer(arguments.tokenizer or identity.tokenizer)
    embedder = Embedder(arguments.embedding_model or identity.embedding_model, device=arguments.device)
    retriever = MilvusRetriever(store, tokenizer, embedder, num_neighbors=arguments.num_neighbors)
    (query,) = retriever.tokenizer.encode_batch([arguments.query])
    found = retriever.retrieve([query[: retriever.chunk_size]])
    for place, doc_id in enumerate(found.doc_ids[0]):
        if doc_id is not None:
            title = f"{found.scores[0, place]:.3f}  {doc_id}, chunk {found.chunk_indices[0, place]}"
            console.print(Text(title, style="bold"))
            tokens = found.ids[0, place][found.attention_mask[0, place]].tolist()
            console.print(Text(retriever.tokenizer.decode(tokens)), end="\n\n")


def run_info(arguments: argparse.Namespace) -> None:
    store = MilvusStore.open(arguments.uri, arguments.collection_name)
    identity = dataclasses.asdict(store.identity())
    identity.pop("embedding_probe")
    index = store.call(store.client.describe_index, store.collection_name, "embedding")
    _print_table({"collection": store.where, **identity, "chunks": store.count(), "index": index["index_type"]})


def _tokenizer(name: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def _print_table(rows: dict) -> None:
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(Text(name.replace("_", " ")), Text(str(value)))
    console.print(table)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `retro-kb`. A mistake of the user's ends it with one line and exit code 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs tracebacks of errors that are said below
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (KnowledgeBaseError, ValueError, OSError) as error:
        print(f"python -m retrieval {arguments.command}: error: {error}", file=sys.stderr)
        sys.exit(2)
