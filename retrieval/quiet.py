"""Keep other libraries quiet: no errors that are raised as well, no progress bars that nobody asked for."""

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar

import huggingface_hub
import transformers
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

_RAISED: ContextVar[list[BaseException] | None] = ContextVar("_RAISED", default=None)


@contextlib.contextmanager
def errors_are_raised() -> Iterator[list[BaseException]]:
    """Print no error of pymilvus or Milvus Lite in this block, whose caller raises or handles them all.

    Yields:
        The exceptions that they would have printed, in a list that grows.
    """
    errors: list[BaseException] = []
    token = _RAISED.set(errors)
    try:
        yield errors
    finally:
        _RAISED.reset(token)


@contextlib.contextmanager
def no_dataset_bars() -> Iterator[None]:
    """Show no progress bars of `datasets` in this block, which shows its own."""
    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def quiet_program() -> None:
    """Show no bars "Loading weights" in this program, and no news of missing kernels. Downloads keep their bars."""
    downloads = not huggingface_hub.utils.are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()
    if downloads:
        huggingface_hub.utils.enable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # the kernels that it misses are used by nothing here


def _is_news(record: logging.LogRecord) -> bool:
    errors = _RAISED.get()
    if errors is None:  # a caller of pymilvus outside this package
        return True
    if record.exc_info and record.exc_info[1] is not None:
        errors.append(record.exc_info[1])
    return False


def _has_no_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info


# They log in the caller's thread
for _name in ("pymilvus.decorators", "pymilvus.client.connection_manager", "milvus_lite.server_manager"):
    logging.getLogger(_name).addFilter(_is_news)
# They log in the embedded server's threads, tracebacks of errors whose words the client gets and raises
for _name in ("grpc._server", "milvus_lite.adapter.grpc.servicer"):
    logging.getLogger(_name).addFilter(_has_no_traceback)
