"""Sharper or softer attention in every converted module, for pictures of another size than the model was trained on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .networks import networks
from .seam import state_of


@contextmanager
def scaled_logits(pipe_or_model: Any, factor: float) -> Iterator[None]:
    """Inside, the logits of the converted attention modules are `factor` times what they would be.

    Args:
        pipe_or_model: A pipeline, with all of its converted networks, or one model.
    Raises:
        ValueError: nothing is converted.
    """
    states = [state for _, model in networks(pipe_or_model) if (state := state_of(model)) is not None]
    if not states:
        raise ValueError(
            f"this {type(pipe_or_model).__name__} is not converted: call linearize_ first, or leave logits alone"
        )
    before = [state.logit_factor for state in states]
    for state in states:
        state.logit_factor = factor
    try:
        yield
    finally:
        for state, own in zip(states, before, strict=True):
            state.logit_factor = own
