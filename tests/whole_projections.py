"""Whole projections as trained weights, without a run that trains them."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lineardit.linearize.adapters.config_entry import write_entry_
from lineardit.linearize.networks import denoiser
from lineardit.linearize.weights.full_weights import replace_weights_
from lineardit.linearize.weights.overlays import plain_layer
from lineardit.linearize.weights.training import projection_names


def train_full_(pipe_or_model: Any, *, targets: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Note the projections of every swapped attention module as changed, to be changed now; as `add_lora_`."""
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
