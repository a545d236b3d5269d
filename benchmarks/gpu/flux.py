"""FLUX.1-dev's transformer in its true shape with random weights, whole or with its first blocks alone."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from .bench import Scale
from .environment import ROOT

CONFIG = ROOT / "tests/data/flux1-dev/transformer/config.json"
BYTES_LEFT = 0.6  # share of the card's memory that weights may take


def config_of(scale: Scale) -> dict[str, Any]:
    return json.loads(CONFIG.read_text()) | scale.model


def build(scale: Scale, units: int) -> nn.Module:
    """On the device, with `units` double blocks and as many single ones for each as FLUX.1-dev has."""
    config = config_of(scale)
    singles = config["num_single_layers"] // config["num_layers"]
    config |= {"num_layers": units, "num_single_layers": units * singles}
    before = torch.get_default_dtype()
    torch.set_default_dtype(scale.dtype)
    with torch.device(scale.device):
        model = FluxTransformer2DModel.from_config(config)
    torch.set_default_dtype(before)
    return model.to(scale.dtype).eval().requires_grad_(False)


def units_that_fit(scale: Scale) -> tuple[int, int]:
    """(units whose weights the card holds, units of the whole model)."""
    config = config_of(scale)
    whole = config["num_layers"]
    if scale.device != "cuda":
        return whole, whole
    free, _ = torch.cuda.mem_get_info()
    return max(2, min(whole, int(BYTES_LEFT * free / unit_bytes(scale)))), whole


def unit_bytes(scale: Scale) -> int:
    """Weights of one double block and its single ones."""
    with torch.device("meta"):
        one, two = (
            FluxTransformer2DModel.from_config(config_of(scale) | {"num_layers": units, "num_single_layers": 2 * units})
            for units in (1, 2)
        )
    count = [sum(weight.numel() for weight in model.parameters()) for model in (one, two)]
    return (count[1] - count[0]) * scale.dtype.itemsize


def step(model: nn.Module, scale: Scale, side: int) -> Callable[[], Tensor]:
    """One denoising step on a picture of side x side tokens."""
    config, device = config_of(scale), torch.device(scale.device)

    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=scale.dtype, device=device)

    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float().to(device)
    inputs = {
        "hidden_states": random(1, side**2, config["in_channels"]),
        "encoder_hidden_states": random(1, scale.text_len, config["joint_attention_dim"]),
        "pooled_projections": random(1, config["pooled_projection_dim"]),
        "timestep": torch.full((1,), 0.5, dtype=scale.dtype, device=device),
        "guidance": torch.full((1,), 3.5, dtype=scale.dtype, device=device),
        "img_ids": torch.nn.functional.pad(places, (1, 0)),
        "txt_ids": torch.zeros(scale.text_len, 3, device=device),
    }

    def run() -> Tensor:
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]

    return run


@contextmanager
def first_units(model: Any, units: int) -> Iterator[None]:
    """Inside, the model has its first blocks alone."""
    doubles, singles = model.transformer_blocks, model.single_transformer_blocks
    model.transformer_blocks = doubles[:units]
    model.single_transformer_blocks = singles[: units * (len(singles) // len(doubles))]
    yield
    model.transformer_blocks, model.single_transformer_blocks = doubles, singles
