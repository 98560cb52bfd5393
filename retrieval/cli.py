"""The command line of the knowledge base, `retro-kb`."""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .addresses import TLS, MilvusAddress
from .analyzers import Analyzer, parse_analyzer
from .bulk import write_bulk_files
from .chunking import CHUNK_SIZE, check_chunk_size
from .collection import NewCollection
from .connection import MilvusConnection
from .embedding import BACKENDS, BATCH_SIZE, DEFAULT_EMBEDDING_MODEL, Embedder, EmbedderSettings
from .errors import KnowledgeBaseError
from .exchange import export_knowledge_base, import_knowledge_base, push_knowledge_base
from .filters import Filter, parse_filter
from .identity import SEARCHES, check_search
from .indexes import KINDS, IndexSettings
from .ingestion import documents_of_rank, ingest, open_collection
from .quiet import quiet_program
from .reranking import Reranker, RerankerSettings
from .retriever import COLLECTION_NAME, NUM_NEIGHBORS, MilvusRetriever
from .rows import VECTOR_TYPES
from .searches import load_embedder, wanted_search
from .settings import add_option
from .sources import Source, at_least_one, read_documents
from .store import MilvusStore
from .tokenization import BulkTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

console = Console(highlight=False)
GGUF_HELP = "Name of a GGUF file in the tokenizer's folder or repository, which holds the tokenizer."
INDEX_HELP = f"{', '.join(KINDS)}; with parameters as in HNSW:M=32,ef=128"
LONGEST_INGESTION = timedelta(days=30)  # the first process to finish waits so long for the last one


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(prog="python -m retrieval", description="A RETRO knowledge base in Milvus.")
    commands = parser.add_subparsers(dest="command", required=True)
    place, models, new = _place_options(), _model_options(), _new_collection_options()
    _add_ingest(commands.add_parser("ingest", parents=[place, models, new], help="Add documents."))
    _add_search(commands.add_parser("search", parents=[place, models], help="Show the neighbors of a text."))
    info = commands.add_parser("info", parents=[place], help="Show identity, size, index and health.")
    info.set_defaults(run=run_info)
    index = commands.add_parser("index", parents=[place], help="Build another index over the same rows.")
    index.add_argument("index", type=_index, help=f"The index: {INDEX_HELP}.")
    index.set_defaults(run=run_index)
    delete = commands.add_parser("delete", parents=[place], help="Delete documents.")
    delete.add_argument("doc_ids", nargs="*", help="Ids of the documents.")
    delete.add_argument(
        "--filter",
        type=_filter,
        help='Delete all documents that match this condition on metadata, as JSON: {"license": "unknown"}.',
    )
    delete.set_defaults(run=run_delete)
    _add_export(commands.add_parser("export", parents=[place], help="Write a copy as a dataset of Parquet files."))
    import_ = commands.add_parser("import", parents=[place, new], help="Read an exported copy.")
    import_.add_argument("source", help="An exported folder, or the name of a dataset on the Hub.")
    import_.set_defaults(run=run_import)
    serve = commands.add_parser("serve", parents=[place], help="Serve a Milvus Lite file to other processes.")
    serve.set_defaults(run=run_serve)
    return parser


def _place_options() -> argparse.ArgumentParser:
    """Return the options that say where the collection is."""
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument(
        "--uri",
        help="Milvus Lite file (.db) or http(s)://host:port. Default: $MILVUS_URI. Access token: $MILVUS_TOKEN.",
    )
    place.add_argument(
        "--collection-name", default=COLLECTION_NAME, help=f"Name of the collection. Default: {COLLECTION_NAME}."
    )
    place.add_argument("--database", help="Database on the server. Default: the server's own.")
    place.add_argument("--timeout", type=float, default=120.0, help="Seconds to wait for Milvus. Default: 120.")
    place.add_argument("--tls-authority", metavar="PEM", help="Certificate of the authority that signed the server's.")
    place.add_argument("--tls-certificate", metavar="PEM", help="This client's certificate, if the server wants one.")
    place.add_argument("--tls-key", metavar="PEM", help="Private key of this client's certificate.")
    place.add_argument("--tls-server-name", help="Name in the server's certificate. Default: the host in the URI.")
    return place


def _model_options() -> argparse.ArgumentParser:
    """Return the options that name the tokenizer and the embedding model."""
    models = argparse.ArgumentParser(add_help=False)
    models.add_argument(
        "--tokenizer",
        help="Tokenizer of the model: a Hub name or a folder. Required for ingest; search uses the stored name.",
    )
    models.add_argument("--gguf-file", help=GGUF_HELP)
    models.add_argument(
        "--embedding-model",
        help="sentence-transformers model, a name or folder. "
        f"Default: {DEFAULT_EMBEDDING_MODEL} for ingest, the stored name for search. BM25 needs none.",
    )
    models.add_argument(
        "--search",
        choices=SEARCHES,
        help="Search by meaning (dense), by words (bm25), or by both (hybrid). Default: as the collection was built, "
        "and dense for a new one.",
    )
    models.add_argument("--device", help="Device of the embedding model. Default: the best available.")
    for name in ("query_prompt", "document_prompt"):
        add_option(models, EmbedderSettings, name, metavar="TEXT")
    add_option(models, EmbedderSettings, "truncate_dim", type=int)
    add_option(models, EmbedderSettings, "backend", choices=BACKENDS)
    add_option(models, EmbedderSettings, "trust_remote_code", action="store_true")
    return models


def _new_collection_options() -> argparse.ArgumentParser:
    """Return the options of a collection that is created."""
    new = argparse.ArgumentParser(add_help=False)
    new.add_argument("--index", type=_index, help=f"Index of a new collection: {INDEX_HELP}. Default: by its size.")
    new.add_argument("--expected-chunks", type=int, help="Chunks that a new collection will hold, to choose its index.")
    new.add_argument(
        "--vector-dtype",
        choices=VECTOR_TYPES,
        default="float32",
        help="Number type of the vectors in a new collection. Default: float32.",
    )
    return new


def _add_ingest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        help="Files (text, .jsonl, .csv, .parquet …, compressed or not), folders, or names of datasets on the Hub.",
    )
    for name in ("text_field", "doc_id_field", "subset", "split"):
        add_option(parser, Source, name)
    add_option(parser, Source, "metadata_fields", nargs="+")
    parser.add_argument(
        "--analyzer",
        type=_analyzer,
        help="How a new bm25 or hybrid collection cuts text into words: standard, english, chinese, code, or Milvus' "
        "analyzer_params as JSON. Default: standard.",
    )
    parser.add_argument("--chunk-size", type=int, default=CHUNK_SIZE, help=f"Tokens in a chunk. Default: {CHUNK_SIZE}.")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=BATCH_SIZE,
        help=f"Chunks that the embedding model reads at once. Default: {BATCH_SIZE}.",
    )
    parser.add_argument(
        "--bulk-files", metavar="FOLDER", help="Write Parquet files for Milvus' bulk import instead of inserting rows."
    )
    parser.set_defaults(run=run_ingest)


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("query", help="The text to search for. Only its first chunk is used.")
    parser.add_argument(
        "-k",
        "--num-neighbors",
        type=int,
        default=NUM_NEIGHBORS,
        help=f"Neighbors to show. Default: {NUM_NEIGHBORS}.",
    )
    parser.add_argument(
        "--filter", type=_filter, help='Condition on metadata, as JSON: {"source": "wiki", "year": {">=": 2000}}.'
    )
    add_option(parser, RerankerSettings, "reranker")
    add_option(parser, RerankerSettings, "rerank_candidates", type=int)
    parser.set_defaults(run=run_search)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="Folder to write; it must not exist.")
    parser.add_argument("--tokenizer", help="The tokenizer, a name or folder. Default: its name at ingestion.")
    parser.add_argument("--gguf-file", help=GGUF_HELP)
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="Upload the folder as a private dataset.")
    parser.set_defaults(run=run_export)


def _index(text: str) -> IndexSettings:
    return _parsed(IndexSettings.parse, text)


def _analyzer(text: str) -> Analyzer:
    return _parsed(parse_analyzer, text)


def _filter(text: str) -> Filter:
    return _parsed(parse_filter, text)


def _parsed(parse: Callable[[str], T], text: str) -> T:
    """Parse an option; argparse shows the message of an ArgumentTypeError, not of a ValueError."""
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
    """Ingest documents, in one process or in several that `accelerate launch` started."""
    check_chunk_size(arguments.chunk_size)
    if arguments.tokenizer is None:
        raise ValueError("--tokenizer is missing. Name the tokenizer of the model that will read the knowledge base.")
    new = _new_collection(arguments)
    ranks = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        # On a machine without accelerator, each process would think it is the only one unless
        # cpu=True.
        ranks = PartialState(cpu=not torch.accelerator.is_available(), timeout=LONGEST_INGESTION)
    rank, processes = (ranks.process_index, ranks.num_processes) if ranks else (0, 1)
    fields = {declared.name: getattr(arguments, declared.name) for declared in dataclasses.fields(Source)[1:]}
    documents = read_documents(*(Source(name, **fields) for name in arguments.sources))
    documents = at_least_one(documents, arguments.sources)  # fails before models are loaded
    search = arguments.search or _stored_search(arguments) or "dense"
    settings = EmbedderSettings.of(arguments)
    check_search(
        search,
        embedding_model=arguments.embedding_model,
        embedding_settings=settings,
        analyzer=arguments.analyzer,
    )
    tokenizer = BulkTokenizer(_tokenizer(arguments))
    embedder = None
    if search != "bm25":
        model = arguments.embedding_model or DEFAULT_EMBEDDING_MODEL
        device = arguments.device or (str(ranks.device) if ranks else None)
        embedder = Embedder(model, settings=settings, device=device, batch_size=arguments.batch_size)
    if ranks:
        documents = documents_of_rank(documents, rank, processes)
    options = {"chunk_size": arguments.chunk_size, "search": search, "analyzer": arguments.analyzer}
    in_all = {}
    if arguments.bulk_files:
        report = write_bulk_files(
            documents, arguments.bulk_files, tokenizer, embedder, rank=rank, progress=rank == 0, **options
        )
        if rank == 0 and arguments.uri:
            with _opened(arguments, new=True) as store:
                open_collection(store, tokenizer, embedder, new=new, **options)
                console.print(f"The empty {store.where} is ready for the files in {arguments.bulk_files}.")
    else:
        with _opened(arguments, new=True) as store:
            report = ingest(documents, store, tokenizer, embedder, new=new, progress=rank == 0, **options)
            if ranks:
                ranks.wait_for_everyone()
            in_all = {"chunks in all": store.count()}
    numbers = dataclasses.asdict(report) | {"seconds": f"{report.seconds:.1f}"}
    _print_table(numbers | in_all, f"process {rank} of {processes}" if ranks else None)


def _stored_search(arguments: argparse.Namespace) -> str | None:
    """Return the search that the collection was built for; None if it is not there."""
    if arguments.bulk_files and not arguments.uri:
        return None
    address = _address(arguments)
    if address.path is not None and not os.path.exists(address.path):
        return None
    with _opened(arguments, new=True) as store:
        return store.identity().search if store.exists() else None


def run_search(arguments: argparse.Namespace) -> None:
    """Print the neighbors of a text with their similarity and document."""
    if not arguments.query.strip():
        raise ValueError("The text to search for is empty. Give a text.")
    with _opened(arguments) as store:
        identity = store.identity()
        tokenizer = _tokenizer(arguments, identity.tokenizer)
        search, settings = wanted_search(store, identity, arguments.search), EmbedderSettings.of(arguments)
        retriever = MilvusRetriever(
            store,
            tokenizer,
            load_embedder(identity, search, arguments.embedding_model, settings, device=arguments.device),
            search=search,
            num_neighbors=arguments.num_neighbors,
            filter=arguments.filter,
            reranker=_reranker(arguments),
            rerank_candidates=arguments.rerank_candidates,
        )
        (query,) = retriever.tokenizer.encode_batch([arguments.query])
        found = retriever.retrieve([query[: retriever.chunk_size]])
    if not any(found.doc_ids[0]):
        console.print("Nothing found.")
    for place, doc_id in enumerate(found.doc_ids[0]):
        if doc_id is not None:
            title = f"{found.scores[0, place]:.3f}  {doc_id}, chunk {found.chunk_indices[0, place]}"
            console.print(Text(title, style="bold"))
            tokens = found.ids[0, place][found.attention_mask[0, place]].tolist()
            starts_text = bool(found.chunk_indices[0, place] == 0)
            console.print(Text(retriever.tokenizer.decode(tokens, starts_text)), end="\n\n")


def _reranker(arguments: argparse.Namespace) -> Reranker | None:
    if arguments.reranker is None:
        return None
    return Reranker(arguments.reranker, device=arguments.device, trust_remote_code=arguments.trust_remote_code)


def run_info(arguments: argparse.Namespace) -> None:
    """Print the identity, size, index and health of a collection."""
    with _opened(arguments) as store:
        identity = dataclasses.asdict(store.identity())
        identity.pop("embedding_probe")
        identity |= identity.pop("embedding_settings")
        identity["analyzer"] = identity["analyzer"] and json.dumps(identity["analyzer"])
        identity = {name: value for name, value in identity.items() if value is not None}
        sources = ", ".join(store.sources()) or "unknown"
        _print_table({"collection": store.where, **identity, "sources": sources, **store.health()})


def run_index(arguments: argparse.Namespace) -> None:
    """Build another index."""
    with _opened(arguments) as store:
        store.reindex(arguments.index)
        _print_table({"collection": store.where, **store.health()})


def run_delete(arguments: argparse.Namespace) -> None:
    """Delete documents, by id or by metadata."""
    with _opened(arguments) as store:
        deleted = store.delete_documents(arguments.doc_ids or None, arguments.filter)
        _print_table({"chunks deleted": deleted, "chunks left": store.count()})


def run_export(arguments: argparse.Namespace) -> None:
    """Write a copy of the knowledge base to a folder, and upload it if asked to."""
    with _opened(arguments) as store:
        tokenizer = BulkTokenizer(_tokenizer(arguments, store.identity().tokenizer))
        chunks = export_knowledge_base(store, arguments.folder, tokenizer, progress=True)
    table = {"folder": arguments.folder, "chunks": chunks}
    if arguments.push_to_hub:
        table["address"] = push_knowledge_base(arguments.folder, arguments.push_to_hub)
    _print_table(table)


def run_import(arguments: argparse.Namespace) -> None:
    """Read an exported copy into a collection."""
    new = _new_collection(arguments)
    with _opened(arguments, new=True) as store:
        chunks = import_knowledge_base(arguments.source, store, new=new, progress=True)
        _print_table({"chunks read": chunks, "chunks in all": store.count()})


def run_serve(arguments: argparse.Namespace) -> None:
    """Keep a Milvus Lite file open for other processes until interrupted."""
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


def _tokenizer(arguments: argparse.Namespace, stored: str | None = None) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that the arguments name, or the one whose name is stored."""
    from .tokenizer_loading import load_tokenizer

    name = arguments.tokenizer or stored
    assert name is not None, "checked before"
    return load_tokenizer(name, arguments.gguf_file)


def _print_table(rows: dict[str, Any], title: str | None = None) -> None:
    """Print names and values as a table."""
    table = Table(show_header=False, box=None, title=title, title_justify="left")
    for name, value in rows.items():
        table.add_row(Text(name.replace("_", " ")), Text(str(value)))
    console.print(table)


def main(argv: list[str] | None = None) -> None:
    """Run `retro-kb`. A user error ends it with one line and exit code 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    quiet_program()
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (KnowledgeBaseError, ValueError, OSError) as error:
        print(f"python -m retrieval {arguments.command}: error: {error}", file=sys.stderr)
        sys.exit(2)
