"""Sharper or softer attention in every converted module, for pictures of another size than the model was trained on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..convert import converted_networks


@contextmanager
def scaled_logits(pipe_or_model: Any, factor: float) -> Iterator[None]:
    """Context manager that multiplies the attention logits of converted modules by `factor`.

    Args:
        pipe_or_model: A pipeline, with all of its converted networks, or one model.
    Raises:
        ValueError: nothing is converted.
    """
    conversions = list(converted_networks(pipe_or_model).values())
    factors = [conversion.logit_factor for conversion in conversions]
    for conversion in conversions:
        conversion.logit_factor = factor
    try:
        yield
    finally:
        for conversion, previous in zip(conversions, factors, strict=True):
            conversion.logit_factor = previous
