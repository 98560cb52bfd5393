"""Failures of Milvus: which ones are transient, and the sentence that explains each to people."""

import grpc
from pymilvus import MilvusException

from .addresses import MilvusAddress, answers
from .errors import KnowledgeBaseError

FAILURES = (MilvusException, grpc.RpcError)
# Milvus' own error codes
UNAVAILABLE = 2  # pymilvus' code for a connection that cannot be made
COLLECTION_NOT_FOUND, DATABASE_NOT_FOUND = 100, 800
NOT_LOADED = {101, 103, 106, 201, 202, 601}  # also while a server that was started again reads its segments
OVERLOADED_OR_RECOVERING = {UNAVAILABLE, 4, 8, 401, 500, 501, 502, 503, 600, 602, 900, 901, 902}
TRANSIENT = NOT_LOADED | OVERLOADED_OR_RECOVERING
FULL = {3: "memory", 7: "disk space", 9: "disk space or quota"}
# Milvus Lite fails with these words when two processes change a collection's properties at once
LITE_RACE = "schema.json.tmp' -> "
TRANSIENT_WORDS = (
    LITE_RACE,
    "milvuslite is closed",  # the process that serves the file is just ending
    "shard leader",
    "shard delegator",
    "not ready",
    "no available",
    "node offline",
    "channel not",
)
TRANSIENT_STATUS = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def is_transient(error: BaseException, *, owns_file: bool) -> bool:
    """Return True if another attempt may succeed.

    Args:
        owns_file: this process itself serves the Milvus Lite file that failed.
    """
    if isinstance(error, KnowledgeBaseError):  # no connection: a server that is being started again
        return True
    if isinstance(error, grpc.RpcError):
        return error.code() in TRANSIENT_STATUS
    code = getattr(error, "code", None)
    if isinstance(code, grpc.StatusCode):  # pymilvus passes some on
        return code in TRANSIENT_STATUS
    text = str(error).lower()
    if owns_file:  # Milvus Lite gives most of its errors the code 1; of these, only the race passes
        return code in NOT_LOADED or LITE_RACE in text
    return isinstance(error, MilvusException) and (code in TRANSIENT or any(word in text for word in TRANSIENT_WORDS))


def reason(error: BaseException | None) -> str:
    """Return Milvus' own words, without the period at their end."""
    return str(getattr(error, "message", None) or error).rstrip(".")


def explain_connection(address: MilvusAddress, error: Exception) -> KnowledgeBaseError:
    """Return the error that a caller sees when no connection can be made."""
    uri = str(address.uri)
    if getattr(error, "code", None) == DATABASE_NOT_FOUND or "database" in str(error) and "exist" in str(error):
        name = address.database or uri.rpartition("/")[2]
        return KnowledgeBaseError(f"There is no database {name!r} at {uri}: create it, or name another one.")
    if isinstance(error, FileNotFoundError):  # it was there when the address was made
        return KnowledgeBaseError(f"No connection to {uri}: there is no TLS file {error.filename} here.")
    if address.is_file or not answers(uri):
        return KnowledgeBaseError(
            f"No connection to {uri}: nothing answers there. Is the server up, and the address right?"
        )
    return KnowledgeBaseError(
        f"{uri} answers, but does not let this program in: check the token (MILVUS_TOKEN), and whether the server "
        "wants https:// and which certificate."
    )


def explain(
    method: str, collection: str | None, uri: str, error: BaseException, *, transient: bool, seconds: float
) -> KnowledgeBaseError:
    """Return the error that a caller sees after the last attempt at a call.

    Args:
        method: the call that failed.
        collection: the collection that was called, None for the server itself.
        seconds: how long the call was tried.
    """
    code = getattr(error, "code", None)
    where = uri if collection is None else f"{collection!r} at {uri}"
    if code == COLLECTION_NOT_FOUND:
        return KnowledgeBaseError(
            f"Collection {where} is not there any more: it was dropped or renamed. Ingest it again, or import a copy."
        )
    if code in FULL or "no space left" in str(error).lower() or "file too large" in str(error).lower():
        lacking = FULL.get(code or 0, "disk space")
        return KnowledgeBaseError(
            f"Milvus at {uri} has no more {lacking} ({reason(error)}). What it acknowledged is "
            "kept. Make room and run the same command again."
        )
    if transient:
        return KnowledgeBaseError(
            f"Milvus at {uri} did not answer {method} for {seconds:.0f} s ({reason(error)}). Is the server up, "
            "and its collection loaded? A longer wait can be asked for with `timeout`."
        )
    return KnowledgeBaseError(f"Milvus refused {method} on {where}: {reason(error)}.")
