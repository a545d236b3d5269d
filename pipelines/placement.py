"""Where a pipeline computes, and where its weights wait meanwhile."""

from typing import Any

import torch

OFFLOADS = ("none", "model", "sequential", "group")


def place_(pipe: Any, device: torch.device, offload: str = "none") -> None:
    """Put a pipeline on a device.

    Args:
        offload: "none": all of it; "model": one part at a time; "group": a few layers at a time; "sequential": one
            layer at a time. Less memory on the device in this order, and slower.
    Raises:
        ValueError: no such offload, or there is no accelerator to offload from.
    """
    if offload not in OFFLOADS:
        raise ValueError(f"offload must be one of {', '.join(OFFLOADS)}, got {offload!r}")
    if offload == "none":
        pipe.to(device)
        return
    if device.type == "cpu":
        raise ValueError(f"offload {offload!r} needs an accelerator, and the device is the CPU: use --offload none")
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda")
