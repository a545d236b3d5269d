"""`lineardit::mala_attention`: magnitude-aware linear attention in two passes, as an operator with its backward.

Pass 1 reads keys and values, pass 2 queries. The published form, r q S - z u, subtracts two large terms wherever the
mean value u is not 0. Centring the values by u avoids that (r = 1 + 1 / (z + eps)):

    m = D**-0.5 / N sum_j phi(k_j),   u = 1/N sum_j v_j,   C = D**-0.5 / N sum_j phi(k_j)^T (v_j - u)
    z_i = phi(q_i) . m,   out_i = r_i phi(q_i) C + z_i / (z_i + eps) u

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

    centred: Tensor  # C [B, H, D, D]
    mean_key: Tensor  # m [B, H, 1, D]
    mean_value: Tensor  # u [B, H, 1, D]


@torch.library.custom_op("lineardit::mala_attention", mutates_args=())
def mala_op(query: Tensor, key: Tensor, value: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B, H, N, D] each -> out [B, H, N, D], and the `State`, which has no gradient."""
    with torch.autocast(query.device.type, enabled=False):
        state = _sum_tokens(key, value)
        out = token_major(value, query.shape[2])
        for part in chunks(query):
            features = feature_map(query[:, :, part])
            mean = features @ state.mean_key.mT  # z [B, H, n, 1]
            spread = (features @ state.centred) * (1 + 1 / (mean + eps))
            out[:, :, part] = spread + mean / (mean + eps) * state.mean_value
    return out, *state


@mala_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, num_heads, num_tokens, head_dim = query.shape
    centred, row = (query.new_empty(batch, num_heads, n, head_dim, dtype=sum_dtype(query)) for n in (head_dim, 1))
    return token_major(value, num_tokens), centred, row, torch.empty_like(row)


def _sum_tokens(key: Tensor, value: Tensor) -> State:
    num_tokens, head_dim = key.shape[2:]
    mean_value = value.mean(2, keepdim=True, dtype=sum_dtype(value))
    sums, key_sum = mean_value.new_zeros(*key.shape[:2], head_dim, head_dim), torch.zeros_like(mean_value)
    for part in chunks(key):
        features = feature_map(key[:, :, part])
        sums += features.mT @ (value[:, :, part] - mean_value)
        key_sum += features.sum(2, keepdim=True)
    share = head_dim**-0.5 / num_tokens
    return State(sums * share, key_sum * share, mean_value)


@torch.library.custom_op("lineardit::mala_attention_backward", mutates_args=())
def _mala_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centred: Tensor,
    mean_key: Tensor,
    mean_value: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    state = State(centred, mean_key, mean_value)
    with torch.autocast(query.device.type, enabled=False):
        grad_query, grad_state = _query_gradients(grad_out, query, state, eps)
        return grad_query, *_key_gradients(key, value, state, grad_state)


def _query_gradients(grad_out: Tensor, query: Tensor, state: State, eps: float) -> tuple[Tensor, State]:
    """Gradients of the queries, and of the state as three independent tensors."""
    grad_query = token_major(query, query.shape[2])
    grad_state = State(*map(torch.zeros_like, state))
    for part in chunks(query):
        q, grad = query[:, :, part], to_sum_dtype(grad_out[:, :, part])
        features = feature_map(q)
        mean = features @ state.mean_key.mT
        inverse = 1 / (mean + eps)
        grad_spread = grad * (1 + inverse)  # of phi(q) C
        grad_factor = ((features @ state.centred) * grad).sum(-1, keepdim=True)
        grad_share = (grad * state.mean_value).sum(-1, keepdim=True)
        grad_mean = (eps * grad_share - grad_factor) * inverse**2
        grad_features = grad_spread @ state.centred.mT + grad_mean * state.mean_key
        grad_query[:, :, part] = grad_features * feature_slope(q)
        grad_state.centred.add_(features.mT @ grad_spread)
        grad_state.mean_key.add_(grad_mean.mT @ features)
        grad_state.mean_value.add_((mean * inverse).mT @ grad)
    return grad_query, grad_state


def _key_gradients(key: Tensor, value: Tensor, state: State, grad_state: State) -> tuple[Tensor, Tensor]:
    num_tokens, head_dim = key.shape[2:]
    share = head_dim**-0.5 / num_tokens
    grad_sums = grad_state.centred
    grad_mean_key = grad_state.mean_key - state.mean_value @ grad_sums.mT
    grad_mean_value = grad_state.mean_value - state.mean_key @ grad_sums
    grad_key, grad_value = (token_major(x, num_tokens) for x in (key, value))
    for part in chunks(key):
        k, v = key[:, :, part], to_sum_dtype(value[:, :, part])
        grad_key[:, :, part] = (v @ grad_sums.mT + grad_mean_key) * share * feature_slope(k)
        grad_value[:, :, part] = feature_map(k) @ grad_sums * share + grad_mean_value / num_tokens
    return grad_key, grad_value


register_backward(mala_op, _mala_backward, 3)
