"""Sharper or softer attention in every converted module, for pictures of another size than the model was trained on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..networks import networks
from .conversion import conversion_of


@contextmanager
def scaled_logits(pipe_or_model: Any, factor: float) -> Iterator[None]:
    """Inside, the logits of the converted attention modules are `factor` times what they would be.

    Args:
        pipe_or_model: A pipeline, with all of its converted networks, or one model.
    Raises:
        ValueError: nothing is converted.
    """
    conversions = [
        conversion for _, model in networks(pipe_or_model) if (conversion := conversion_of(model)) is not None
    ]
    if not conversions:
        raise ValueError(
            f"this {type(pipe_or_model).__name__} is not converted: call linearize_ first, or leave logits alone"
        )
    before = [conversion.logit_factor for conversion in conversions]
    for conversion in conversions:
        conversion.logit_factor = factor
    try:
        yield
    finally:
        for conversion, own in zip(conversions, before, strict=True):
            conversion.logit_factor = own
