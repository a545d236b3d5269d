"""What a distillation trains on the base's weights: LoRA, or the whole projections of the swapped attention modules."""

import math
import re
from collections.abc import Iterator, Sequence

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..adapters.config_entry import write_entry_
from ..convert import converted_networks, swapped
from ..networks import denoiser
from ..seam.conversion import add_overlay, overlays_of
from .low_rank import LORA_NAME, LowRank
from .overlays import plain_layer, refuse_fused

# Children of an attention module that process text or an image prompt, or belong to the kernel.
_NOT_FOR_IMAGE = re.compile(r"add_.*|to_add_out|txt_.*|.*_t|processor|linear_kernel")


def add_lora_(
    pipe_or_model: DiffusionPipeline | nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, nn.Parameter]:
    """Add an untrained LoRA to the projections of every swapped attention module; the output does not change yet.

    Args:
        pipe_or_model: A pipeline or denoiser after `linearize_`.
        rank: Rank of the low-rank term.
        alpha: The term's factor is alpha / rank; default: rank, a factor of 1.
        targets: Names of Linear layers below an attention module. A module that lacks one is skipped. None: all that
            process the image, to_q, to_k, to_v and to_out.0 in most models.
        dtype: Dtype of the new parameters, which are on each layer's own device.
    Returns:
        The new parameters by their name in the model.
    Raises:
        ValueError: rank < 1, nothing is converted, no swapped module has a target, or the model already has a LoRA.
    """
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    _, model = denoiser(pipe_or_model)
    names = projection_names(model, targets)
    if any(overlay.describe().kind == "lora" for overlay in overlays_of(model).items):
        raise ValueError("this model already has a trainable LoRA: use that one, or restore_ and linearize_ first")
    factors = {}
    for name in names:
        layer = plain_layer(model, name)
        device = layer.weight.device
        down = torch.empty(rank, layer.in_features, dtype=dtype, device=device)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        factors[name] = (down, torch.zeros(layer.out_features, rank, dtype=dtype, device=device))
    add_overlay(model, LowRank(model, factors, alpha=rank if alpha is None else alpha))
    write_entry_(model)
    return {name: parameter for name, parameter in model.named_parameters() if f".{LORA_NAME}." in name}


def projection_names(model: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """Full names of the target layers below the swapped modules; None: of all Linear layers that process the image.

    Raises:
        ValueError: nothing is converted, or no swapped module has a target.
    """
    converted_networks(model)  # raises if nothing is converted
    refuse_fused(model)
    if targets is None:
        modules = swapped(model).items()
        return [f"{name}.{layer}" for name, attention in modules for layer in _image_layers(attention)]
    candidates = {target: [f"{name}.{target}" for name in swapped(model)] for target in targets}
    layers = {name for name, _ in model.named_modules()}
    found = {target: [name for name in names if name in layers] for target, names in candidates.items()}
    for target, names in found.items():
        if not names:
            raise ValueError(f"targets must be layers of the swapped attention modules, got {target!r}")
    return [name for names in found.values() for name in names]


def _image_layers(attention: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the Linear layers that process the image; one wrapped in a style's peft layer goes by its own name."""
    for name, child in attention.named_children():
        if _NOT_FOR_IMAGE.fullmatch(name):
            continue
        if isinstance(child, nn.Linear) or hasattr(child, "get_base_layer"):
            yield prefix + name
        else:
            yield from _image_layers(child, f"{prefix}{name}.")
