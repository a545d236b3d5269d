"""Tables of a window that are kept on the device from call to call."""

from collections.abc import Callable
from functools import _lru_cache_wrapper, lru_cache, wraps
from typing import Any, TypeVar

import torch

# For `torch.library.custom_op`. A CUDA graph would run such an operator again without asking for its tables: those of a
# window that was not used for a while are freed, and their memory may hold something else by then.
KEEPS_TABLES: dict[str, Any] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}  # from torch 2.8 on
)

Table = TypeVar("Table")
_KEPT: list["_lru_cache_wrapper[Any]"] = []


def kept(*, maxsize: int) -> Callable[[Callable[..., Table]], "_lru_cache_wrapper[Table]"]:
    """A decorator of functions that make tables: an `lru_cache` that `release_tables` empties.

    Whatever mode the first call comes from, tables serve training as well, and tensors without a device are on the CPU.
    """

    def decorate(make: Callable[..., Table]) -> "_lru_cache_wrapper[Table]":
        @lru_cache(maxsize=maxsize)
        @wraps(make)
        def cached(*arguments: Any, **named: Any) -> Table:
            with torch.inference_mode(False), torch.device("cpu"):
                return make(*arguments, **named)

        _KEPT.append(cached)
        return cached

    return decorate


def release_tables() -> None:
    """Free all tables; a call that needs some makes them anew."""
    for cached in _KEPT:
        cached.cache_clear()
