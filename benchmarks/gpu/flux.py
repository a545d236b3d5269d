"""FLUX.1-dev's transformer in its true shape with random weights, whole or only its first blocks."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from lineardit.linearize.measures.random_weights import random_model

from .bench import Scale
from .environment import ROOT

CONFIG = ROOT / "tests/data/flux1-dev/transformer/config.json"
WEIGHTS_SHARE = 0.6  # of the card's memory: the rest is for activations


def model_config(scale: Scale) -> dict[str, Any]:
    return json.loads(CONFIG.read_text()) | scale.model


def config_with_units(scale: Scale, units: int) -> dict[str, Any]:
    """The config with `units` double blocks, and as many single blocks for each as FLUX.1-dev has."""
    config = model_config(scale)
    singles = config["num_single_layers"] // config["num_layers"]
    return config | {"num_layers": units, "num_single_layers": units * singles}


def build(scale: Scale, units: int) -> nn.Module:
    """The model on the device and in the dtype of this run."""
    device = torch.device(scale.device)
    return random_model("FluxTransformer2DModel", config_with_units(scale, units), device, scale.dtype)


def units_that_fit(scale: Scale) -> tuple[int, int]:
    """(units whose weights the card holds, units of the whole model)."""
    total = model_config(scale)["num_layers"]
    if torch.device(scale.device).type != "cuda":
        return total, total
    free, _ = torch.cuda.mem_get_info()
    return max(2, min(total, int(WEIGHTS_SHARE * free / unit_bytes(scale)))), total


def unit_bytes(scale: Scale) -> int:
    """Bytes of the weights of one double block and its single blocks."""
    with torch.device("meta"):
        models = [FluxTransformer2DModel.from_config(config_with_units(scale, units)) for units in (1, 2)]
    one_unit, two_units = (sum(weight.numel() for weight in model.parameters()) for model in models)
    return (two_units - one_unit) * scale.dtype.itemsize


def step(model: nn.Module, scale: Scale, side: int) -> Callable[[], Tensor]:
    """One denoising step on a picture of side x side tokens."""
    config, device = model_config(scale), torch.device(scale.device)

    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=scale.dtype, device=device)

    positions = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float().to(device)
    inputs = {
        "hidden_states": random(1, side**2, config["in_channels"]),
        "encoder_hidden_states": random(1, scale.text_len, config["joint_attention_dim"]),
        "pooled_projections": random(1, config["pooled_projection_dim"]),
        "timestep": torch.full((1,), 0.5, dtype=scale.dtype, device=device),
        "guidance": torch.full((1,), 3.5, dtype=scale.dtype, device=device),
        "img_ids": torch.nn.functional.pad(positions, (1, 0)),
        "txt_ids": torch.zeros(scale.text_len, 3, device=device),
    }

    def run() -> Tensor:
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]

    return run


@contextmanager
def first_units(model: Any, units: int) -> Iterator[None]:
    """A context in which the model has only its first blocks."""
    doubles, singles = model.transformer_blocks, model.single_transformer_blocks
    model.transformer_blocks = doubles[:units]
    model.single_transformer_blocks = singles[: units * (len(singles) // len(doubles))]
    try:
        yield
    finally:
        model.transformer_blocks, model.single_transformer_blocks = doubles, singles
