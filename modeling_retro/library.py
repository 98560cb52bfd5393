"""Names that depend on the installed transformers: of the cache and of common arguments."""

import functools
import inspect
from collections.abc import Callable, Iterable

from transformers import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils import TransformersKwargs

# transformers 5.24 renamed `past_key_values` in forwards, mask functions, generate() and outputs.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
LOSS_ARGUMENTS = {"shift_labels", "ignore_index"}  # arguments of the library's loss, beside num_items_in_batch


@functools.cache
def argument_names(function: Callable) -> frozenset[str]:
    """Return the names of a function's arguments."""
    return frozenset(inspect.signature(function).parameters)


def either_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """Return the cache that a caller gave under one of its two names.

    Raises:
        ValueError: both are given.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("The cache is given twice, as `cache` and as `past_key_values`. Give it once.")
    return past_key_values if cache is None else cache


def check_arguments(function: str, given: Iterable[str], known: Iterable[str] = ()) -> None:
    """Refuse keyword arguments that no model of the library takes.

    A function with `**kwargs` would silently ignore them, and a misspelled cache would give wrong
    results.

    Raises:
        TypeError: names them.
    """
    unknown = set(given) - TransformersKwargs.__optional_keys__ - set(known)
    if unknown:
        names = ", ".join(sorted(unknown))
        raise TypeError(
            f"{function}() got unexpected keyword arguments: {names}. Remove them, or check their spelling."
        )
