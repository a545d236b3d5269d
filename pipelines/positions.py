"""Positions of image tokens: in float32, and beyond those that a model was trained on, by its own mechanism."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..linearize.families.positions import rectangle
from ..linearize.networks import denoiser, networks

# Modules that hold these models' square table of positions, which is added to the tokens.
_TABLES = {
    "SD3Transformer2DModel": "pos_embed",
    "CogView3PlusTransformer2DModel": "patch_embed",
    "AuraFlowTransformer2DModel": "pos_embed",
}


def takes_image_ids(model: nn.Module) -> bool:
    """Whether the position of each token of the image is an argument, as in FLUX.1."""
    return "img_ids" in inspect.signature(type(model).forward).parameters


def computes_rope(model: nn.Module) -> bool:
    """Whether each forward computes rotary positions from a base, as in FLUX.1; Qwen-Image's are a table."""
    return takes_image_ids(model) and hasattr(getattr(model, "pos_embed", None), "theta")


@contextmanager
def exact_positions(pipe_or_model: Any) -> Iterator[None]:
    """Inside, a model that takes `img_ids`, such as FLUX.1, and its ControlNet get them in float32, in any attention.

    Its pipelines make them in the dtype of the text: in bfloat16 rows and columns share positions beyond 256 tokens.
    """

    def exact(_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = kwargs["img_ids"]
        return args, {**kwargs, "img_ids": rectangle(ids[0] if ids.ndim == 3 else ids)[1]}

    models = [network for _, network in networks(pipe_or_model) if takes_image_ids(network)]
    handles = [network.register_forward_pre_hook(exact, with_kwargs=True) for network in models]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def rope_scaled(pipe_or_model: Any, factor: float) -> Iterator[None]:
    """Inside, the base (theta) of the rotary positions of the model and its ControlNet is multiplied by `factor`.

    Raises:
        ValueError: the model does not compute rotary positions in each forward (FLUX.1, FLUX.2 and Chroma do).
    """
    if factor == 1:
        yield
        return
    _, model = denoiser(pipe_or_model)
    if not computes_rope(model):
        raise ValueError(
            f"{type(model).__name__} has no rotary base to scale, so rope_factor must be 1, got {factor}: "
            "set it in the plan's stages"
        )
    ropes: list[Any] = [network.pos_embed for _, network in networks(pipe_or_model) if computes_rope(network)]
    bases = [rope.theta for rope in ropes]
    for rope, theta in zip(ropes, bases, strict=True):
        rope.theta = theta * factor
    try:
        yield
    finally:
        for rope, theta in zip(ropes, bases, strict=True):
            rope.theta = theta


def table_side(model: nn.Module) -> int | None:
    """Positions along one side of the table that a model adds to its tokens; None: it has none."""
    if type(model).__name__ not in _TABLES:
        return None
    table: Tensor = _embedding_of(model).pos_embed
    return math.isqrt(table.numel() // table.shape[-1])


@contextmanager
def positions_stretched(pipe_or_model: Any, side: int, device: torch.device) -> Iterator[None]:
    """Inside, a model's table of positions is interpolated bicubically to `side` positions along each side.

    If it has as many already, or there is no table, nothing changes.

    Args:
        device: Where the model will run.
    Raises:
        ValueError: the table is not accessible, being offloaded layer by layer.
    """
    _, model = denoiser(pipe_or_model)
    trained_side = table_side(model)
    if trained_side is None or side <= trained_side:
        yield
        return
    embedding = _embedding_of(model)
    table, table_size = embedding.pos_embed, embedding.pos_embed_max_size
    if table.is_meta:
        raise ValueError(
            f"the positions of this {type(model).__name__} must be stretched to {side} a side, but are offloaded layer "
            "by layer: use model or group offload instead of sequential"
        )
    stretched = _stretched(table.detach().to(device), trained_side, side)
    embedding.pos_embed = nn.Parameter(stretched, requires_grad=False) if isinstance(table, nn.Parameter) else stretched
    embedding.pos_embed_max_size = side if table_size == trained_side else side**2  # AuraFlow counts all of them
    try:
        yield
    finally:
        table.data = table.data.to(embedding.proj.weight.device)  # the model may have moved; keeps the tensor object
        embedding.pos_embed, embedding.pos_embed_max_size = table, table_size


def _embedding_of(model: nn.Module) -> Any:
    return getattr(model, _TABLES[type(model).__name__])


def _stretched(table: Tensor, trained_side: int, side: int) -> Tensor:
    """[..., trained_side * trained_side, C] or [trained_side, trained_side, C] -> the same for `side`."""
    channels = table.shape[-1]
    image = table.float().reshape(1, trained_side, trained_side, channels).permute(0, 3, 1, 2)
    larger = interpolate(image, (side, side), mode="bicubic", align_corners=True).permute(0, 2, 3, 1).to(table.dtype)
    return larger[0] if table.shape[:-1] == (trained_side, trained_side) else larger.reshape(1, side * side, channels)
