"""Positions of image tokens: exact ones, and rotary ones beyond those a model was trained on, by its own mechanism."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..linearize.convert import denoiser
from ..linearize.families.positions import rectangle


def is_told_positions(model: nn.Module) -> bool:
    """Whether the position of each token of the image is an argument, as in FLUX.1."""
    return "img_ids" in inspect.signature(type(model).forward).parameters


def computes_rotation(model: nn.Module) -> bool:
    """Whether each forward computes rotary positions from a base, as in FLUX.1; Qwen-Image's are a table."""
    return is_told_positions(model) and hasattr(getattr(model, "pos_embed", None), "theta")


@contextmanager
def exact_positions(pipe_or_model: Any) -> Iterator[None]:
    """Inside, a model that is told `img_ids`, as FLUX.1 is, gets them in float32, in any attention.

    Its pipelines make them in the dtype of the text: in bfloat16 rows and columns share positions beyond 256 tokens.
    """
    _, model = denoiser(pipe_or_model)
    if not is_told_positions(model):
        yield
        return

    def exact(_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = kwargs["img_ids"]
        return args, {**kwargs, "img_ids": rectangle(ids[0] if ids.ndim == 3 else ids)[1]}

    handle = model.register_forward_pre_hook(exact, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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
    if not computes_rotation(model):
        raise ValueError(
            f"{type(model).__name__} has no rotary base to scale, so rope_factor must be 1, got {factor}: "
            "set it in the plan's stages"
        )
    rope: Any = model.pos_embed
    theta = rope.theta
    rope.theta = theta * factor
    try:
        yield
    finally:
        rope.theta = theta
