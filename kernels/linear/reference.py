"""Reference of linear attention, with the weights [N, N] in memory. Every implementation is tested against it.

All functions take query, key, value [B, H, N, D] of any floating dtype and sum in float32, or in float64 for float64.
"""

import math

import torch
from torch import Tensor


def mala_attention_reference(query: Tensor, key: Tensor, value: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Magnitude-aware linear attention: out_i = sum_j ((1 + 1 / (z_i + eps)) s_ij - z_i) v_j / N.

    Here s_ij = D**-0.5 phi(q_i) . phi(k_j) and z_i = sum_j s_ij / N. Returns [B, H, N, D], dtype of value.
    """
    scores = _features(query) @ _features(key).mT * query.shape[-1] ** -0.5  # [B, H, N, N]
    mean = scores.mean(-1, keepdim=True)
    weights = ((1 + 1 / (mean + eps)) * scores - mean) / key.shape[2]
    return (weights @ _to_sum_dtype(value)).to(value.dtype)


def rala_attention_reference(query: Tensor, key: Tensor, value: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Rank-augmented linear attention: out_i = sum_j s_ij v_j / (sum_j s_ij + eps).

    Here s_ij = a_j phi(q_i) . phi(k_j) and a = softmax_j(D**-0.5 mean_i(phi(q_i)) . phi(k_j)). Returns [B, H, N, D],
    dtype of value.
    """
    phi_query, phi_key = _features(query), _features(key)
    logits = phi_query.mean(2, keepdim=True) @ phi_key.mT * query.shape[-1] ** -0.5  # [B, H, 1, N]
    weights = phi_query @ phi_key.mT * logits.softmax(-1)
    return (weights @ _to_sum_dtype(value) / (weights.sum(-1, keepdim=True) + eps)).to(value.dtype)


def log_mass_reference(query: Tensor, key: Tensor, *, scale: float) -> Tensor:
    """`log_mass` from the mean and variance of every query's logits. Returns [B, H, N], float32 or float64."""
    logits = _to_sum_dtype(query) @ _to_sum_dtype(key).mT * scale
    mean, variance = logits.mean(-1), logits.var(-1, correction=0)
    count = torch.tensor(key.shape[2], dtype=torch.float64, device=logits.device)
    largest = torch.special.ndtri((count - 0.375) / (count + 0.25)).to(logits.dtype)
    spread = variance > largest**2
    deviation = torch.where(spread, variance, 1).sqrt()  # the slope of sqrt is infinite at 0
    rise = torch.where(spread, largest * deviation - largest**2 / 2, variance / 2)
    return mean + math.log(key.shape[2]) + rise


def _features(x: Tensor) -> Tensor:
    return torch.where(x > 0, _to_sum_dtype(x) + 1, _to_sum_dtype(x).clamp(max=0).exp())


def _to_sum_dtype(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
