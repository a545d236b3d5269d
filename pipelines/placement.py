"""The device that a pipeline runs on, and the offloading of its weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..linearize.adapters.quantization import Quantization
from ..linearize.weights.quantized import quantized_types

OFFLOADS = ("none", "model", "sequential", "group")

PLACEMENT_KEY = "_lineardit_place"  # attribute of a pipeline

_NO_LAYERS_OF_4_BITS = (
    "offload 'sequential' cannot move weights that bitsandbytes packs in 4 bits: use --offload model or group, or "
    "another quantization"
)


@dataclass(frozen=True)
class Placement:
    """Where a pipeline without weights would be put (a device, and one of `OFFLOADS`), and its quantization."""

    device: torch.device
    offload: str
    quantization: Quantization | None = None


def place_(pipe: Any, device: torch.device, offload: str = "none") -> None:
    """Put a pipeline on a device.

    Args:
        offload: "none": all of it; "model": one part at a time; "group": a few layers at a time; "sequential": one
            layer at a time. In this order, it takes less memory on the device and more time.
    Raises:
        ValueError: unknown offload, no accelerator to offload from, or weights that do not support this offload.
    """
    check_offload(device, offload)
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    kinds = " ".join(quantized_types(part) or "" for part in parts)
    if offload == "sequential" and "Params4bit" in kinds:
        raise ValueError(_NO_LAYERS_OF_4_BITS)
    unsupported = [type(part).__name__ for part in parts if not getattr(part, "_supports_group_offloading", True)]
    if offload == "group" and unsupported:
        raise ValueError(
            f"diffusers does not support offload 'group' for a {' or a '.join(unsupported)}: use --offload model"
        )
    if offload == "none":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        # diffusers' streams leave weights of torchao behind (huggingface/diffusers#13281)
        streams = device.type == "cuda" and "Tensor" not in kinds
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=streams)


def record_placement_(
    pipe: Any, device: torch.device, offload: str = "none", quantization: Quantization | None = None
) -> None:
    """Record where `place_` would put a pipeline without weights (`from_pretrained(weights=False)`), for estimates.

    Args:
        quantization: Of the denoiser's weights.
    Raises:
        ValueError: as in `place_`.
    """
    check_offload(device, offload, quantization)
    setattr(pipe, PLACEMENT_KEY, Placement(device, offload, quantization))


def recorded_placement(pipe: Any) -> Placement | None:
    """The place recorded by `record_placement_`, if any."""
    return getattr(pipe, PLACEMENT_KEY, None)


def check_offload(device: torch.device, offload: str, quantization: Quantization | None = None) -> None:
    """Raise the ValueError of `place_` if it can be known before a pipeline is loaded.

    Args:
        quantization: Of the denoiser's weights, as they will be loaded.
    """
    if offload not in OFFLOADS:
        raise ValueError(f"offload must be one of {', '.join(OFFLOADS)}, got {offload!r}")
    if offload != "none" and device.type == "cpu":
        raise ValueError(f"offload {offload!r} needs an accelerator, and the device is the CPU: use --offload none")
    if offload == "sequential" and quantization is not None and quantization.quant_backend == "bitsandbytes_4bit":
        raise ValueError(_NO_LAYERS_OF_4_BITS)
