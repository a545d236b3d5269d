"""The text of a cascade, encoded in its first stage and kept for the others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..linearize.networks import denoiser


@contextmanager
def text_encoded_once(pipe: Any) -> Iterator[Callable[[], None]]:
    """Inside, what `pipe.encode_prompt` gives before the first step of a call is kept for the calls after it.

    They must be calls with the same text: what the pipeline hands to `encode_prompt` is not looked at. Once a call
    denoises, a callback that encodes text of its own gets that. Pipelines without the method encode in every call.

    Yields:
        To be called before each call of the pipeline.
    """
    own = getattr(pipe, "encode_prompt", None)
    if own is None:
        yield lambda: None
        return
    replaced = vars(pipe).get("encode_prompt")  # by the user
    kept: list[Any] = []  # of the first, second, ... encoding in a call
    number: int | None = 0

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        nonlocal number
        if number is None:
            return own(*args, **kwargs)
        if number == len(kept):
            kept.append(own(*args, **kwargs))
        number += 1
        return kept[number - 1]

    def begin() -> None:
        nonlocal number
        number = 0

    def denoises(*_: Any) -> None:
        nonlocal number
        number = None

    handle = denoiser(pipe)[1].register_forward_pre_hook(denoises)
    pipe.encode_prompt = encode_prompt
    try:
        yield begin
    finally:
        handle.remove()
        del pipe.encode_prompt
        if replaced is not None:
            pipe.encode_prompt = replaced
