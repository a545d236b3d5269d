"""`lineardit::log_mass`: the softmax mass of a set of keys, estimated at linear cost.

    log sum_j exp(l_ij),   l_ij = scale q_i . k_j,   from the exact mean and variance of l_i over the N keys

    mean_i = scale q_i . m,   var_i = scale**2 q_i K q_i^T,   m the mean, K the covariance [D, D] of the keys
    log_mass_i = mean_i + log N + var_i / 2                          where sqrt(var_i) <= b
                 mean_i + log N + b sqrt(var_i) - b**2 / 2           beyond

The first line is exact in the limit of many keys if a query's logits are normally distributed. Beyond b, the largest
logit dominates the sum (Derrida's random energy model, Phys. Rev. B 24, 2613, 1981). b is the expected maximum of N
standard normal samples: the inverse normal CDF at (N - 3/8) / (N + 1/4) (Blom, 1958). The two lines agree in value and
slope where they meet. B batch, H heads, N keys and queries, D head dimension.
"""

import math
from statistics import NormalDist

import torch
from torch import Tensor

from ..pieces.results import sum_dtype, token_major
from .backward import register_backward
from .features import chunks, to_sum_dtype


def log_mass(query: Tensor, key: Tensor, *, scale: float) -> Tensor:
    """Estimate the logarithm of the keys' part of the softmax denominator; differentiable once.

    Args:
        query, key: [B, H, N, D], any strides; float16, bfloat16, float32 or float64.
        scale: Scale of the logits.
    Returns:
        [B, H, N], float32, or float64 for float64.
    """
    return _log_mass_op(query, key, scale)[0]


@torch.library.custom_op("lineardit::log_mass", mutates_args=())
def _log_mass_op(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """log_mass [B, H, N], the mean [B, H, 1, D] and covariance [B, H, D, D] of the keys."""
    with torch.autocast(query.device.type, enabled=False):
        mean, covariance = _moments(key)
        out = covariance.new_empty(query.shape[:3])
        for part in chunks(query):
            q = to_sum_dtype(query[:, :, part]) * scale
            variance = ((q @ covariance) * q).sum(-1)
            out[:, :, part] = (q @ mean.mT)[..., 0] + _log_mean_of_exponentials(variance, key.shape[2])[0]
    return out, mean, covariance


@_log_mass_op.register_fake
def _(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_heads, num_tokens, head_dim = query.shape
    shapes = ((num_tokens,), (1, head_dim), (head_dim, head_dim))
    out, mean, covariance = (query.new_empty(batch, num_heads, *shape, dtype=sum_dtype(query)) for shape in shapes)
    return out, mean, covariance


def _moments(key: Tensor) -> tuple[Tensor, Tensor]:
    num_tokens, head_dim = key.shape[2:]
    mean = key.mean(2, keepdim=True, dtype=sum_dtype(key))
    covariance = mean.new_zeros(*key.shape[:2], head_dim, head_dim)
    for part in chunks(key):
        centred = to_sum_dtype(key[:, :, part]) - mean
        covariance += centred.mT @ centred
    return mean, covariance / num_tokens


def _log_mean_of_exponentials(variance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """log_mass_i - mean_i, and its derivative with respect to var_i."""
    largest = NormalDist().inv_cdf((count - 0.375) / (count + 0.25))
    spread = variance > largest**2
    deviation = torch.where(spread, variance, 1).sqrt()
    rise = torch.where(spread, largest * deviation - largest**2 / 2, variance / 2)
    return math.log(count) + rise, torch.where(spread, largest / (2 * deviation), 0.5)


@torch.library.custom_op("lineardit::log_mass_backward", mutates_args=())
def _log_mass_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, mean: Tensor, covariance: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    num_tokens = key.shape[2]
    grad_query, grad_key = (token_major(x, num_tokens) for x in (query, key))
    grad_mean, grad_covariance = torch.zeros_like(mean), torch.zeros_like(covariance)
    with torch.autocast(query.device.type, enabled=False):
        for part in chunks(query):
            q, grad = to_sum_dtype(query[:, :, part]) * scale, grad_out[:, :, part, None]
            projected = q @ covariance
            grad_variance = grad * _log_mean_of_exponentials((projected * q).sum(-1, keepdim=True), num_tokens)[1]
            grad_query[:, :, part] = (grad * mean + 2 * grad_variance * projected) * scale
            grad_mean += grad.mT @ q
            grad_covariance += (grad_variance * q).mT @ q
        for part in chunks(key):
            centred = to_sum_dtype(key[:, :, part]) - mean
            grad_key[:, :, part] = (grad_mean + 2 * centred @ grad_covariance) / num_tokens
    return grad_query, grad_key


register_backward(_log_mass_op, _log_mass_backward, 2)
