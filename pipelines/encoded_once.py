"""The text of a cascade, encoded in its first stage and kept for the others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def text_encoded_once(pipe: Any) -> Iterator[Callable[[], None]]:
    """Inside, what `pipe.encode_prompt` gives in one call of the pipeline is kept for those after it.

    They must be calls with the same text: what the pipeline hands to `encode_prompt` is not looked at. Pipelines
    without that method encode in every call.

    Yields:
        To be called before each call of the pipeline.
    """
    own = getattr(pipe, "encode_prompt", None)
    if own is None:
        yield lambda: None
        return
    kept: list[Any] = []  # of the first, second, ... encoding in a call
    number = 0

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        nonlocal number
        if number == len(kept):
            kept.append(own(*args, **kwargs))
        number += 1
        return kept[number - 1]

    def begin() -> None:
        nonlocal number
        number = 0

    pipe.encode_prompt = encode_prompt
    try:
        yield begin
    finally:
        del pipe.encode_prompt
