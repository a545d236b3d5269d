"""The text of a cascade, encoded in its first stage and kept for the others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..linearize.networks import denoiser


@contextmanager
def encode_text_once(pipe: Any) -> Iterator[Callable[[], None]]:
    """Inside, results of `pipe.encode_prompt` before the first step of a call are kept for later calls.

    All calls must have the same text: arguments of `encode_prompt` are not compared. From the first step on nothing is
    reused, so that callbacks can encode other text. Pipelines without the method encode in every call.

    Yields:
        A function to call before each call of the pipeline.
    """
    original = getattr(pipe, "encode_prompt", None)
    if original is None:
        yield lambda: None
        return
    override = vars(pipe).get("encode_prompt")  # set by the user
    results: list[Any] = []  # of the first, second, ... encoding in a call
    number: int | None = 0

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        nonlocal number
        if number is None:
            return original(*args, **kwargs)
        if number == len(results):
            results.append(original(*args, **kwargs))
        number += 1
        return results[number - 1]

    def begin_call() -> None:
        nonlocal number
        number = 0

    def stop_reuse(*_: Any) -> None:
        nonlocal number
        number = None

    handle = denoiser(pipe)[1].register_forward_pre_hook(stop_reuse)
    pipe.encode_prompt = encode_prompt
    try:
        yield begin_call
    finally:
        handle.remove()
        del pipe.encode_prompt
        if override is not None:
            pipe.encode_prompt = override
