"""Converted models as training leaves them, without a training run."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lineardit.linearize.adapters.config_entry import write_entry_
from lineardit.linearize.networks import denoiser
from lineardit.linearize.weights.full_weights import replace_weights_
from lineardit.linearize.weights.overlays import plain_layer
from lineardit.linearize.weights.training import add_lora_, projection_names


def trained_(
    pipe_or_model: Any,
    kind: str,
    *,
    rank: int = 2,
    alpha: float | None = None,
    targets: Sequence[str] = ("to_q", "to_out.0"),
) -> None:
    """Move kernels ("kernels"), and LoRA ("lora"), whole projections ("full") or "both", from their initial values."""
    _, model = denoiser(pipe_or_model)
    parameters = {name: weight for name, weight in model.named_parameters() if ".linear_kernel." in name}
    if kind in ("full", "both"):
        parameters |= train_full_(model, targets=targets)
    if kind in ("lora", "both"):
        parameters |= add_lora_(model, rank=rank, alpha=alpha)
    move_(parameters.values())


def move_(parameters: Iterable[Tensor]) -> None:
    """Move parameters from their initial values, as training would."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.3)


def train_full_(pipe_or_model: Any, *, targets: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Mark the projections of every swapped attention module as trained, and return them, like `add_lora_`."""
    _, model = denoiser(pipe_or_model)
    parameters = {
        f"{name}.{attribute}": parameter
        for name in projection_names(model, targets)
        for attribute, parameter in plain_layer(model, name).named_parameters(recurse=False)
    }
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    replace_weights_(model, weights, keep_original=True)
    write_entry_(model)
    return parameters
