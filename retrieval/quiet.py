"""Silence other libraries: errors that are also raised, and unwanted progress bars."""

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
    """Silence error logs of pymilvus and Milvus Lite in this block.

    The caller must raise or handle all of these errors.

    Yields:
        A list that grows with each silenced exception.
    """
    errors: list[BaseException] = []
    token = _RAISED.set(errors)
    try:
        yield errors
    finally:
        _RAISED.reset(token)


@contextlib.contextmanager
def no_dataset_bars() -> Iterator[None]:
    """Hide progress bars of `datasets` in this block."""
    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def quiet_program() -> None:
    """Hide the bars "Loading weights" and warnings about missing kernels in this program.

    Downloads keep their bars.
    """
    downloads = not huggingface_hub.utils.are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()
    if downloads:
        huggingface_hub.utils.enable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # nothing here uses its kernels


def _is_news(record: logging.LogRecord) -> bool:
    errors = _RAISED.get()
    if errors is None:  # pymilvus was called from outside this package
        return True
    if record.exc_info and record.exc_info[1] is not None:
        errors.append(record.exc_info[1])
    return False


def _has_no_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info


# These log in the caller's thread.
for _name in ("pymilvus.decorators", "pymilvus.client.connection_manager", "milvus_lite.server_manager"):
    logging.getLogger(_name).addFilter(_is_news)
# These log tracebacks in the embedded server's threads. The client raises the same errors.
for _name in ("grpc._server", "milvus_lite.adapter.grpc.servicer"):
    logging.getLogger(_name).addFilter(_has_no_traceback)
