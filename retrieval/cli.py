"""The knowledge base on the command line: ingest, search, info, index, delete, export, import, serve (`retro-kb`)."""

import argparse
import contextlib
import dataclasses
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .addresses import TLS, MilvusAddress
from .bulk import write_bulk_files
from .chunking import Document, check_chunk_size
from .collection import NewCollection
from .connection import MilvusConnection
from .embedding import DEFAULT_EMBEDDING_MODEL, Embedder
from .errors import KnowledgeBaseError
from .exchange import export_knowledge_base, import_knowledge_base, push_knowledge_base
from .filters import parse_filter
from .indexes import KINDS, IndexSettings
from .ingestion import documents_of_rank, ingest, open_collection
from .quiet import quiet_program
from .retriever import MilvusRetriever
from .rows import VECTOR_TYPES
from .sources import at_least_one, read_all
from .store import MilvusStore
from .tokenization import BulkTokenizer

console = Console(highlight=False)
INDEX_HELP = f"{', '.join(KINDS)}; with parameters as in HNSW:M=32,ef=128"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m retrieval", description="A RETRO knowledge base in Milvus.")
    commands = parser.add_subparsers(dest="command", required=True)
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument(
        "--uri", help="Milvus Lite file (.db) or http(s)://host:port; default: MILVUS_URI. The token: MILVUS_TOKEN"
    )
    place.add_argument("--collection-name", default="retro")
    place.add_argument("--database", help="of the server; default: the server's own")
    place.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for Milvus (default: 120)")
    place.add_argument("--tls-authority", metavar="PEM", help="certificate that the server's is signed by")
    place.add_argument("--tls-certificate", metavar="PEM", help="this client's own, if the server asks for one")
    place.add_argument("--tls-key", metavar="PEM", help="its key")
    place.add_argument("--tls-server-name", help="name in the server's certificate, if not that of the URI")
    models = argparse.ArgumentParser(add_help=False)
    models.add_argument("--tokenizer", help="name or folder of the model's tokenizer")
    models.add_argument("--embedding-model", help="name or folder of a sentence-transformers model")
    models.add_argument("--device", help="where the embedding model runs; default: the best there is")
    made = argparse.ArgumentParser(add_help=False)
    made.add_argument("--index", type=_index, help=f"of a new collection: {INDEX_HELP}")
    made.add_argument("--expected-chunks", type=int, help="of a new collection, to choose its index by")
    made.add_argument("--vector-dtype", choices=VECTOR_TYPES, default="float32", help="of a new collection")

    add = commands.add_parser("ingest", parents=[place, models, made], help="add documents to the knowledge base")
    add.add_argument(
        "sources", nargs="+", help="files (text, .jsonl, .csv, .parquet …, compressed or not), folders, datasets"
    )
    add.add_argument("--text-field", default="text", help="field of a row with the text (default: text)")
    add.add_argument("--doc-id-field", help="field of a row with its id; default: source and number")
    add.add_argument("--metadata-fields", nargs="+", default=(), help="fields of a row to filter by")
    add.add_argument("--subset", help="of a dataset of the hub")
    add.add_argument("--split", default="train", help="of a dataset of the hub")
    add.add_argument("--chunk-size", type=int, default=64, help="tokens in a chunk (default: 64)")
    add.add_argument("--batch-size", type=int, default=32, help="of the embedding model (default: 32)")
    add.add_argument(
        "--bulk-files", metavar="FOLDER", help="write Parquet files for Milvus' bulk import instead of inserting"
    )
    add.set_defaults(run=run_ingest)

    find = commands.add_parser("search", parents=[place, models], help="show the neighbors of a text")
    find.add_argument("query", help="text to search for; only its first chunk is used")
    find.add_argument("-k", "--num-neighbors", type=int, default=2)
    find.add_argument("--filter", type=_filter, help='of metadata, as JSON: {"source": "wiki", "year": {">=": 2000}}')
    find.set_defaults(run=run_search)

    info = commands.add_parser("info", parents=[place], help="show identity, size, index and health")
    info.set_defaults(run=run_info)

    index = commands.add_parser("index", parents=[place], help="build another index over the same rows")
    index.add_argument("index", type=_index, help=INDEX_HELP)
    index.set_defaults(run=run_index)

    delete = commands.add_parser("delete", parents=[place], help="delete documents")
    delete.add_argument("doc_ids", nargs="*", help="ids of documents")
    delete.add_argument("--filter", type=_filter, help="all documents whose metadata match, as for search")
    delete.set_defaults(run=run_delete)

    export = commands.add_parser(
        "export", parents=[place], help="write the knowledge base as a dataset of Parquet files"
    )
    export.add_argument("folder")
    export.add_argument("--tokenizer", help="name or folder; default: the name that the knowledge base was built with")
    export.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the folder as a dataset, private at first")
    export.set_defaults(run=run_export)

    import_ = commands.add_parser("import", parents=[place, made], help="build a knowledge base from an exported one")
    import_.add_argument("source", help="an exported folder, or the name of a dataset on the hub")
    import_.set_defaults(run=run_import)

    serve = commands.add_parser("serve", parents=[place], help="keep a Milvus Lite file open for other processes")
    serve.set_defaults(run=run_serve)
    return parser


def _index(text: str) -> IndexSettings:
    return _argument(IndexSettings.parse, text)


def _filter(text: str) -> dict:
    return _argument(parse_filter, text)


def _argument(parse, text: str):
    """argparse hides the words of a ValueError."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _address(arguments: argparse.Namespace) -> MilvusAddress:
    tls = TLS(arguments.tls_authority, arguments.tls_certificate, arguments.tls_key, arguments.tls_server_name)
    return MilvusAddress(
        arguments.uri, database=arguments.database, timeout=arguments.timeout, tls=None if tls == TLS() else tls
    )


@contextlib.contextmanager
def _opened(arguments: argparse.Namespace, *, new: bool = False) -> Iterator[MilvusStore]:
    """Open the collection, which must exist unless `new`, and close it at the end."""
    open_ = MilvusStore if new else MilvusStore.open
    store = open_(_address(arguments), arguments.collection_name)
    try:
        yield store
    finally:
        store.close()


def _new_collection(arguments: argparse.Namespace) -> NewCollection:
    return NewCollection(arguments.index, arguments.expected_chunks, arguments.vector_dtype)


def run_ingest(arguments: argparse.Namespace) -> None:
    check_chunk_size(arguments.chunk_size)
    if arguments.tokenizer is None:
        raise ValueError("--tokenizer is needed: the tokenizer of the model that will read the knowledge base.")
    ranks = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # by `accelerate launch`
        from accelerate import PartialState

        # without an accelerator it would take every process for the only one; the first to finish waits for the last
        ranks = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))
    rank, processes = (ranks.process_index, ranks.num_processes) if ranks else (0, 1)
    documents: Iterator[Document] = read_all(
        arguments.sources,
        text_field=arguments.text_field,
        doc_id_field=arguments.doc_id_field,
        metadata_fields=arguments.metadata_fields,
        subset=arguments.subset,
        split=arguments.split,
    )
    documents = at_least_one(documents, arguments.sources)  # said before models are loaded
    tokenizer = BulkTokenizer(_tokenizer(arguments.tokenizer))
    model = arguments.embedding_model or DEFAULT_EMBEDDING_MODEL
    device = arguments.device or (str(ranks.device) if ranks else None)
    embedder = Embedder(model, device=device, batch_size=arguments.batch_size)
    if ranks:
        documents = documents_of_rank(documents, rank, processes)
    settings = {"chunk_size": arguments.chunk_size, "progress": rank == 0}
    if arguments.bulk_files:
        report = write_bulk_files(documents, arguments.bulk_files, tokenizer, embedder, rank=rank, **settings)
        if rank == 0 and arguments.uri:
            with _opened(arguments, new=True) as store:
                open_collection(store, tokenizer, embedder, arguments.chunk_size, _new_collection(arguments))
                console.print(f"The empty {store.where} is ready for the files in {arguments.bulk_files}.")
    else:
        with _opened(arguments, new=True) as store:
            report = ingest(documents, store, tokenizer, embedder, new=_new_collection(arguments), **settings)
            if ranks:
                ranks.wait_for_everyone()
            in_all = {"chunks in all": store.count()}
    numbers = dataclasses.asdict(report) | {"seconds": f"{report.seconds:.1f}"}
    title = f"process {rank} of {processes}" if ranks else None
    _print_table(numbers if arguments.bulk_files else numbers | in_all, title)


def run_search(arguments: argparse.Namespace) -> None:
    if not arguments.query.strip():
        raise ValueError("The text to search for is empty.")
    with _opened(arguments) as store:
        identity = store.identity()
        tokenizer = _tokenizer(arguments.tokenizer or identity.tokenizer)
        embedder = Embedder(arguments.embedding_model or identity.embedding_model, device=arguments.device)
        retriever = MilvusRetriever(
            store, tokenizer, embedder, num_neighbors=arguments.num_neighbors, filter=arguments.filter
        )
        (query,) = retriever.tokenizer.encode_batch([arguments.query])
        found = retriever.retrieve([query[: retriever.chunk_size]])
    for place, doc_id in enumerate(found.doc_ids[0]):
        if doc_id is not None:
            title = f"{found.scores[0, place]:.3f}  {doc_id}, chunk {found.chunk_indices[0, place]}"
            console.print(Text(title, style="bold"))
            tokens = found.ids[0, place][found.attention_mask[0, place]].tolist()
            console.print(Text(retriever.tokenizer.decode(tokens)), end="\n\n")


def run_info(arguments: argparse.Namespace) -> None:
    with _opened(arguments) as store:
        identity = dataclasses.asdict(store.identity())
        identity.pop("embedding_probe")
        sources = ", ".join(store.sources()) or "unknown"
        _print_table({"collection": store.where, **identity, "sources": sources, **store.health()})


def run_index(arguments: argparse.Namespace) -> None:
    with _opened(arguments) as store:
        store.reindex(arguments.index)
        _print_table({"collection": store.where, **store.health()})


def run_delete(arguments: argparse.Namespace) -> None:
    with _opened(arguments) as store:
        deleted = store.delete_documents(arguments.doc_ids or None, arguments.filter)
        _print_table({"chunks deleted": deleted, "chunks left": store.count()})


def run_export(arguments: argparse.Namespace) -> None:
    with _opened(arguments) as store:
        tokenizer = BulkTokenizer(_tokenizer(arguments.tokenizer or store.identity().tokenizer))
        chunks = export_knowledge_base(store, arguments.folder, tokenizer, progress=True)
    table = {"folder": arguments.folder, "chunks": chunks}
    if arguments.push_to_hub:
        table["address"] = push_knowledge_base(arguments.folder, arguments.push_to_hub)
    _print_table(table)


def run_import(arguments: argparse.Namespace) -> None:
    with _opened(arguments, new=True) as store:
        chunks = import_knowledge_base(arguments.source, store, new=_new_collection(arguments), progress=True)
        _print_table({"chunks read": chunks, "chunks in all": store.count()})


def run_serve(arguments: argparse.Namespace) -> None:
    connection = MilvusConnection(_address(arguments))
    try:
        if not connection.is_file:
            raise ValueError(f"{connection.uri} is a server already; `serve` is for Milvus Lite files.")
        if not connection.owns_file:
            raise KnowledgeBaseError(f"Another process serves {connection.uri} already, at {connection.serving}.")
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        print(f"{connection.uri} is served at {connection.serving} until this is interrupted.", flush=True)
        print("Other processes of this machine may name the file or the address.", flush=True)
        stop.wait()
    finally:
        connection.close()


def _tokenizer(name: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def _print_table(rows: dict, title: str | None = None) -> None:
    table = Table(show_header=False, box=None, title=title, title_justify="left")
    for name, value in rows.items():
        table.add_row(Text(name.replace("_", " ")), Text(str(value)))
    console.print(table)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `retro-kb`. A mistake of the user's ends it with one line and exit code 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    quiet_program()
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (KnowledgeBaseError, ValueError, OSError) as error:
        print(f"python -m retrieval {arguments.command}: error: {error}", file=sys.stderr)
        sys.exit(2)
