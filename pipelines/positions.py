"""Rotary positions beyond those a model was trained on, by the model's own mechanism."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..linearize.convert import denoiser


@contextmanager
def rope_scaled(pipe_or_model: Any, factor: float) -> Iterator[None]:
    """Inside, the base (theta) of the model's rotary positions is `factor` times what it is.

    Raises:
        ValueError: the model computes no rotary positions anew in each forward (FLUX.1, FLUX.2 and Chroma do).
    """
    if factor == 1:
        yield
        return
    _, model = denoiser(pipe_or_model)
    rope: Any = getattr(model, "pos_embed", None)
    if not hasattr(rope, "theta"):
        raise ValueError(
            f"{type(model).__name__} has no rotary base to scale, so rope_factor must be 1, got {factor}: "
            "set it in the plan's stages"
        )
    theta = rope.theta
    rope.theta = theta * factor
    try:
        yield
    finally:
        rope.theta = theta
