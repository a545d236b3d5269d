"""Compile the repeated blocks of a model, converted or not."""

import inspect
from collections import Counter
from typing import Any, cast

import torch

from .convert import swapped
from .errors import UnsupportedModelError
from .families import Family, family_of
from .networks import denoiser


def compile_(pipe_or_model: Any, *, backend: str = "inductor", family: Family | None = None) -> int:
    """Compile each repeated block in place, as one full graph.

    Blocks of one class share a graph if their configs are equal, and resolutions share one from the second on. With
    several configs, torch's recompile limit is raised where torch allows it (2.13); older versions raise at the limit
    of 8.

    Args:
        backend: Backend of `torch.compile`.
        family: Family of a model of your own; None: the one it was converted with, or the one of the model's class.
    Returns:
        The number of blocks.
    Raises:
        UnsupportedModelError: the model's class is unknown, or has no block of the classes that its family names.
    """
    _, model = denoiser(pipe_or_model)
    family = family or family_of(model)
    configs = {cast(Any, module).linear_kernel.config for module in swapped(model).values()}
    options = {"recompile_limit": 8 * (1 + len(configs))}
    if "recompile_limit" not in inspect.signature(torch.compile).parameters:
        options = {}
    blocks = [module for module in model.modules() if type(module).__name__ in family.blocks]
    if not blocks:
        repeated = Counter(type(module).__name__ for module in model.modules() if list(module.children()))
        often = ", ".join(name for name, _ in repeated.most_common(5))
        raise UnsupportedModelError(
            f"nothing to compile: Family.blocks names {', '.join(family.blocks) or 'no class'}, but this "
            f"{type(model).__name__} has none; its most frequent modules are {often}"
        )
    for block in blocks:
        block.compile(fullgraph=True, backend=backend, **options)
    return len(blocks)
