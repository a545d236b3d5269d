"""Tables of a window that are cached on the device between calls."""

from collections.abc import Callable
from functools import _lru_cache_wrapper, lru_cache, wraps
from typing import Any, TypeVar

import torch

# Options of `torch.library.custom_op` for operators that read cached tables. A CUDA graph replays without looking them
# up, and tables that have left the cache are freed: their memory may hold something else by then.
CACHES_TABLES: dict[str, Any] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}  # from torch 2.8 on
)

Table = TypeVar("Table")
_CACHES: list["_lru_cache_wrapper[Any]"] = []


def cached_table(*, maxsize: int) -> Callable[[Callable[..., Table]], "_lru_cache_wrapper[Table]"]:
    """A decorator of functions that make tables: an `lru_cache` that `release_tables` clears.

    Tables are made outside inference mode, so that they serve training too, and with the CPU as the default device.
    """

    def decorate(make: Callable[..., Table]) -> "_lru_cache_wrapper[Table]":
        @lru_cache(maxsize=maxsize)
        @wraps(make)
        def cached(*arguments: Any, **named: Any) -> Table:
            with torch.inference_mode(False), torch.device("cpu"):
                return make(*arguments, **named)

        _CACHES.append(cached)
        return cached

    return decorate


def release_tables() -> None:
    """Free all tables; calls that need them rebuild them."""
    for cached in _CACHES:
        cached.cache_clear()
