"""`lineardit::rala_attention`: rank-augmented linear attention as an operator with its backward.

    g = mean_i phi(q_i),   a = softmax_j(D**-0.5 g . phi(k_j)),   S = sum_j a_j phi(k_j)^T v_j,   m = sum_j a_j phi(k_j)
    out_i = phi(q_i) S / (phi(q_i) . m + eps)

One pass over the queries for g, two over the keys (the logits of a, then S and m), and one over the queries for out.
Opaque to the compiler, so that one graph serves every number of tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..pieces.results import sum_dtype, token_major
from .backward import register_backward
from .features import chunks, feature_map, feature_slope, to_sum_dtype


class State(NamedTuple):
    """What all queries share, in float32 or float64."""

    sums: Tensor  # S [B, H, D, D]
    key_sum: Tensor  # m [B, H, 1, D]
    mean_query: Tensor  # D**-0.5 g [B, H, 1, D]
    log_sum: Tensor  # log-sum-exp of the logits of a, [B, H, 1, 1]


@torch.library.custom_op("lineardit::rala_attention", mutates_args=())
def rala_op(query: Tensor, key: Tensor, value: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """[B, H, N, D] each -> out [B, H, N, D], and the `State`, which has no gradient."""
    with torch.autocast(query.device.type, enabled=False):
        state = _sum_tokens(query, key, value)
        out = token_major(value, query.shape[2])
        for part in chunks(query):
            features = feature_map(query[:, :, part])
            out[:, :, part] = features @ state.sums / (features @ state.key_sum.mT + eps)
    return out, *state


@rala_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, num_heads, num_tokens, head_dim = query.shape
    shapes = ((head_dim, head_dim), (1, head_dim), (1, head_dim), (1, 1))
    state = [query.new_empty(batch, num_heads, *shape, dtype=sum_dtype(query)) for shape in shapes]
    return token_major(value, num_tokens), state[0], state[1], state[2], state[3]


def _sum_tokens(query: Tensor, key: Tensor, value: Tensor) -> State:
    batch, num_heads, num_tokens, head_dim = query.shape
    sums = query.new_zeros(batch, num_heads, head_dim, head_dim, dtype=sum_dtype(query))
    query_sum, key_sum = (sums.new_zeros(batch, num_heads, 1, head_dim) for _ in range(2))
    for part in chunks(query):
        query_sum += feature_map(query[:, :, part]).sum(2, keepdim=True)
    mean_query = query_sum * (head_dim**-0.5 / num_tokens)
    logits = sums.new_empty(batch, num_heads, num_tokens, 1)
    for part in chunks(key):
        logits[:, :, part] = feature_map(key[:, :, part]) @ mean_query.mT
    log_sum = logits.logsumexp(2, keepdim=True)
    for part in chunks(key):
        weighted = feature_map(key[:, :, part]) * (logits[:, :, part] - log_sum).exp()
        sums += weighted.mT @ to_sum_dtype(value[:, :, part])
        key_sum += weighted.sum(2, keepdim=True)
    return State(sums, key_sum, mean_query, log_sum)


@torch.library.custom_op("lineardit::rala_attention_backward", mutates_args=())
def _rala_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sums: Tensor,
    key_sum: Tensor,
    mean_query: Tensor,
    log_sum: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    state = State(sums, key_sum, mean_query, log_sum)
    with torch.autocast(query.device.type, enabled=False):
        grad_sums, grad_key_sum = torch.zeros_like(sums), torch.zeros_like(key_sum)
        for part in chunks(query):
            features = feature_map(query[:, :, part])
            grad_product, grad_normalizer = _quotient_gradients(features, grad_out[:, :, part], state, eps)
            grad_sums += features.mT @ grad_product
            grad_key_sum += grad_normalizer.mT @ features
        grad_key, grad_value, grad_mean = _key_gradients(key, value, state, grad_sums, grad_key_sum)
        grad_query = token_major(query, query.shape[2])
        for part in chunks(query):
            features = feature_map(query[:, :, part])
            grad_product, grad_normalizer = _quotient_gradients(features, grad_out[:, :, part], state, eps)
            grad_features = grad_product @ sums.mT + grad_normalizer * key_sum + grad_mean
            grad_query[:, :, part] = grad_features * feature_slope(query[:, :, part])
    return grad_query, grad_key, grad_value


def _quotient_gradients(features: Tensor, grad_out: Tensor, state: State, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of phi(q) S [B, H, n, D] and of phi(q) . m [B, H, n, 1]."""
    normalizer = features @ state.key_sum.mT + eps
    grad_product = to_sum_dtype(grad_out) / normalizer
    out = features @ state.sums / normalizer
    return grad_product, -(grad_product * out).sum(-1, keepdim=True)


def _key_gradients(
    key: Tensor, value: Tensor, state: State, grad_sums: Tensor, grad_key_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of keys and values, and of phi(q) through the weights a, [B, H, 1, D], the same for each query."""
    num_tokens, head_dim = key.shape[2:]
    grad_key, grad_value = (token_major(x, num_tokens) for x in (key, value))
    grad_mean = torch.zeros_like(state.mean_query)
    # sum_j a_j grad_a_j, which the backward of softmax subtracts
    mean = (state.sums * grad_sums).sum((2, 3), keepdim=True) + (state.key_sum * grad_key_sum).sum(3, keepdim=True)
    for part in chunks(key):
        k, v = key[:, :, part], to_sum_dtype(value[:, :, part])
        features = feature_map(k)
        weight = (features @ state.mean_query.mT - state.log_sum).exp()
        per_weight = v @ grad_sums.mT + grad_key_sum  # gradient of a_j phi(k_j)
        grad_logit = weight * ((features * per_weight).sum(-1, keepdim=True) - mean)
        grad_key[:, :, part] = (weight * per_weight + grad_logit * state.mean_query) * feature_slope(k)
        grad_value[:, :, part] = weight * (features @ grad_sums)
        grad_mean += grad_logit.mT @ features
    return grad_key, grad_value, grad_mean * (head_dim**-0.5 / num_tokens)


register_backward(rala_op, _rala_backward, 3)
