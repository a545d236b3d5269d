"""Stock pipelines that are called with a prompt, as by users; their pictures depend on the noise only."""

import inspect
from typing import Any

import diffusers
import pytest
import torch

from lineardit.distill.identity import main_dtype
from lineardit.linearize.networks import denoiser
from tiny_stock import STOCK


def prompted(name: str) -> Any:
    """A new pipeline of this line of `tiny_stock`; any prompt makes the two pictures of the line's arguments."""
    stock = STOCK[name]
    try:
        getattr(diffusers, stock.needs)
    except (AttributeError, RuntimeError) as error:  # it is missing, or needs a newer transformers
        pytest.skip(f"this diffusers has no {stock.needs}: {error}")
    pipe, arguments = stock.make(), stock.arguments()
    draw = type(pipe).__call__
    signature = inspect.signature(draw)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(self, *args, **kwargs).arguments
        prompt = given.pop("prompt")  # embeddings replace it
        assert isinstance(prompt, str) or all(isinstance(text, str) for text in prompt)
        dtype = main_dtype(denoiser(self)[1])
        return draw(**{**given, **{name: _cast(dtype, value) for name, value in arguments.items()}})

    call.__signature__ = signature  # type: ignore[attr-defined]
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {"__call__": call})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _cast(dtype: torch.dtype, value: Any) -> Any:
    """An embedding, or list of them, in this dtype."""
    if isinstance(value, list):
        return [_cast(dtype, item) for item in value]
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def size_of(name: str) -> tuple[int, int]:
    """Height and width in pixels that the pipeline of this name draws."""
    arguments = STOCK[name].arguments()
    return arguments.get("height", 64), arguments.get("width", 64)
