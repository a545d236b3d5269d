"""Compile the repeated blocks of a model, converted or not."""

import inspect
from typing import Any

import torch

from .convert import denoiser
from .families import Family, family_of


def compile_(
    pipe_or_model: Any, *, backend: str = "inductor", recompile_limit: int = 16, family: Family | None = None
) -> int:
    """Compile each repeated block, in place, as one whole graph; the number of blocks.

    Resolutions share a graph from the second on. Layers with settings of their own get graphs of their own, where
    torch knows how to keep them apart (2.13).

    Args:
        recompile_limit: Graphs that one block may have before it is an error.
        family: Of a model of your own; None: found by the model's class.
    Raises:
        UnsupportedModelError: the model's class is unknown, or has no such blocks.
    """
    _, model = denoiser(pipe_or_model)
    family = family or family_of(model)
    known = inspect.signature(torch.compile).parameters
    options = {"recompile_limit": recompile_limit}
    options = {name: value for name, value in options.items() if name in known}
    blocks = [module for module in model.modules() if type(module).__name__ in family.blocks]
    for block in blocks:
        block.compile(fullgraph=True, backend=backend, **options)
    return len(blocks)
