"""What a method costs in one attention layer of FLUX.1 at 4096 x 4096 pixels, and its name in a table."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lineardit.linearize.methods import METHODS, Clear

GRID, TEXT_LEN, SHAPE = (256, 256), 512, {"num_heads": 24, "head_dim": 128}


def title(method: Any) -> str:
    """The method as Python code, without the fields left at their defaults."""
    if isinstance(method, Mapping):
        return ", ".join(f"{title(one)} in {pattern}" for pattern, one in method.items())
    settings = [
        f"{field.name}={_format_value(getattr(method, field.name))}"
        for field in fields(method)
        if getattr(method, field.name) != field.default
    ]
    return f"{type(method).__name__}({', '.join(settings)})"


def _format_value(value: Any) -> str:
    if type(value) in METHODS:
        return title(value)
    return f"{value:g}" if isinstance(value, float) else repr(value)


def flops(config: Any) -> int:
    """FLOPs of one call at FLUX's 4K shape; None: softmax over everything."""
    tokens = GRID[0] * GRID[1] + TEXT_LEN
    pairs = tokens**2 if config is None else METHODS[type(config)].pairs(config, GRID, TEXT_LEN, **SHAPE)
    return 4 * pairs * SHAPE["num_heads"] * SHAPE["head_dim"]


def window_of_equal_flops(config: Any) -> Clear:
    """The smallest radius, in steps of 0.5, that costs at least as much as this config."""
    radius = 1.0
    while flops(Clear(radius=radius)) < flops(config):
        radius += 0.5
    return Clear(radius=radius)
