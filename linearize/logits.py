"""Sharper or softer attention in every converted module, for pictures of another size than the model was trained on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .networks import denoiser
from .seam import state_of


@contextmanager
def scaled_logits(pipe_or_model: Any, factor: float) -> Iterator[None]:
    """Inside, the logits of the converted attention modules are `factor` times what they would be.

    Raises:
        ValueError: nothing is converted.
    """
    _, model = denoiser(pipe_or_model)
    state = state_of(model)
    if state is None:
        raise ValueError(f"this {type(model).__name__} is not converted: call linearize_ first, or leave logits alone")
    before = state.logit_factor
    state.logit_factor = factor
    try:
        yield
    finally:
        state.logit_factor = before
