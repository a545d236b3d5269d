"""Fingerprints that tell models apart, and the precision that a model was loaded in."""

import hashlib
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from ..linearize.weights.quantized import quantized_types, stored_tensors


def fingerprint(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """A digest of parameter names, shapes and the first 8 numbers of each weight (if not on the meta device).

    Args:
        dtype: Weights are compared in this dtype; None: in their own.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        weight = _offloaded_weight(model, name) if parameter.is_meta else parameter
        for stored in [] if weight is None else stored_tensors(weight):
            first = stored.flatten()[:8].to(dtype or stored.dtype)
            digest.update(first.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _offloaded_weight(model: nn.Module, name: str) -> Tensor | None:
    """A weight that accelerate keeps elsewhere between forwards, as in sequential offload; None if there is none."""
    owner, _, leaf = name.rpartition(".")
    hook: Any = getattr(model.get_submodule(owner), "_hf_hook", None)
    weight_maps = [getattr(one, "weights_map", None) for one in getattr(hook, "hooks", [hook])]
    return next((weights[leaf] for weights in weight_maps if weights is not None), None)


def architecture(model: nn.Module) -> str | None:
    """A digest of parameter names and shapes; None if some are quantized, which changes their shapes."""
    if quantized_types(model):
        return None
    shapes = [f"{name} {tuple(parameter.shape)}" for name, parameter in model.named_parameters()]
    return hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:16]


def main_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most weights, quantized ones aside: some models keep a few in float32 whatever is requested."""
    counts: Counter[torch.dtype] = Counter({torch.float32: 0})
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.itemsize > 1:
            counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0]
