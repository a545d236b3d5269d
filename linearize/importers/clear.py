"""Checkpoints of CLEAR (arXiv:2412.16112, github.com/Huage001/CLEAR) for FLUX.

They hold the projections `to_q`, `to_k`, `to_v` (and `to_out.0` of the double blocks) of every attention module and,
with pooled keys, `processor.spatial_weight` [1, 1, 1, p, 1, p, 1]: learned weights of a cell of p x p tokens.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adapters.config_entry import write_entry_
from ..adapters.fitting import check_shapes, shapes_of
from ..convert import linearize_, restore_, swapped
from ..errors import UnsupportedModelError
from ..families import family_of
from ..folders import read_tensors
from ..matching import attention_modules
from ..methods.clear import Clear
from ..networks import denoiser
from ..report import SwapReport
from ..weights.full_weights import check_writable, replace_weights_
from ..weights.overlays import check_unmerged, plain_layer, refuse_fused

_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
_POOLING = ".processor.spatial_weight"
_MODEL_CLASS = "FluxTransformer2DModel"  # the one that checkpoints are published for


def load_clear_checkpoint_(
    model: Any,
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    *,
    radius: float,
    pool_size: int | None = None,
    keep_original: bool = True,
) -> SwapReport:
    """Convert a FLUX transformer to `Clear` in place and load a checkpoint published by CLEAR's authors.

    Args:
        model: A FluxTransformer2DModel, or a pipeline of one; an earlier conversion is undone first.
        path_or_state_dict: The `.safetensors` file, or its tensors.
        radius: CLEAR's `window_size`, such as 16 for clear_local_16.safetensors.
        pool_size: CLEAR's `down_factor`; None for checkpoints without one.
        keep_original: Keep the overwritten projections on the CPU, so that `restore_` and `dense` work.
    Raises:
        UnsupportedModelError: the model has another class.
        ValueError: tensors are missing, unexpected or of another shape (the error lists them), pool_size is not the
            checkpoint's, or the file is damaged; the model is unchanged.
    """
    config = Clear(radius=radius, pool_size=pool_size)
    _, transformer = denoiser(model)
    if type(transformer).__name__ != _MODEL_CLASS:
        raise UnsupportedModelError(f"CLEAR's checkpoints are for a {_MODEL_CLASS}, got a {type(transformer).__name__}")
    if isinstance(path_or_state_dict, Mapping):
        tensors, what = path_or_state_dict, "the tensors of the checkpoint"
    else:
        tensors, what = read_tensors(Path(path_or_state_dict)), f"the tensors of {path_or_state_dict}"
    refuse_fused(transformer)
    _check_pool_size(tensors, pool_size, what)
    check_shapes(shapes_of(tensors), _expected(transformer, pool_size), what=what)
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith(_POOLING)}
    check_unmerged(transformer, weights)
    check_writable(transformer, weights)

    if swapped(transformer):
        restore_(transformer)
    report = linearize_(model, config)
    for name, module in swapped(transformer).items():
        if pool_size is not None:
            weight = tensors[name + _POOLING].reshape(pool_size, pool_size)
            module.get_submodule("linear_kernel").load_state_dict({"pool_weight": weight})
    replace_weights_(transformer, weights, keep_original=keep_original)
    write_entry_(transformer)
    return report


def _check_pool_size(tensors: Mapping[str, Tensor], pool_size: int | None, what: str) -> None:
    sizes = {tensor.shape[3] for name, tensor in tensors.items() if name.endswith(_POOLING) and tensor.ndim == 7}
    if sizes != ({pool_size} - {None}):
        trained = " and ".join(map(str, sizes)) or "None"
        raise ValueError(f"pool_size must be {trained}, which {what} were trained with, got {pool_size}")


def _expected(transformer: nn.Module, pool_size: int | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint of this model."""
    names, _ = attention_modules(transformer, family_of(transformer))
    layers = {name for name, _ in transformer.named_modules()}
    expected: dict[str, tuple[int, ...]] = {}
    for layer in (f"{name}.{projection}" for name in names for projection in _PROJECTIONS):
        if layer in layers:
            parameters = plain_layer(transformer, layer).named_parameters(recurse=False)
            expected |= {f"{layer}.{key}": tuple(parameter.shape) for key, parameter in parameters}
    if pool_size is not None:
        expected |= {name + _POOLING: (1, 1, 1, pool_size, 1, pool_size, 1) for name in names}
    return expected
