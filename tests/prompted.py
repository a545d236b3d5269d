"""Stock pipelines that are called with a prompt, as users do: what they draw depends on the noise alone."""

import inspect
from typing import Any

import diffusers
import pytest

from tiny_stock import STOCK


def prompted(name: str) -> Any:
    """A new pipeline of this line of `tiny_stock`; each prompt makes the two pictures of its arguments."""
    stock = STOCK[name]
    try:
        getattr(diffusers, stock.needs)
    except (AttributeError, RuntimeError) as error:  # it is not there, or needs a newer transformers
        pytest.skip(f"this diffusers has no {stock.needs}: {error}")
    pipe, arguments = stock.make(), stock.arguments()
    draw = type(pipe).__call__

    def call(self: Any, prompt: Any = None, **given: Any) -> Any:
        assert prompt is not None
        return draw(self, **{**given, **arguments})

    call.__signature__ = inspect.signature(draw)  # type: ignore[attr-defined]
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {"__call__": call})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def size_of(name: str) -> tuple[int, int]:
    """Height and width in pixels that the pipeline of this name draws."""
    arguments = STOCK[name].arguments()
    return arguments.get("height", 64), arguments.get("width", 64)
