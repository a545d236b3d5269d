"""Softmax attention over a part of the keys, in a form that can be merged with other parts.

With logits s_ij = scale * q_i . k_j + bias_ij, a part returns its own average and its log-sum-exp

    out_i = sum_j exp(s_ij - lse_i) v_j        lse_i = log sum_j exp(s_ij)

and two parts merge exactly into the softmax over both (`merge`). The backward of every part takes the merged `out`
and `lse`: exp(s_ij - lse_i) is then the weight in the whole softmax, and the gradients of the parts add up. The
gradient of lse itself, where it is used, adds exp(s_ij - lse_i) grad_lse_i to that of each logit.

Three implementations of one interface. `PLAIN` uses public operations, in float32 and float64. `FLASH`, for CPUs, and
`EFFICIENT`, for half precision on CUDA, are PyTorch's own kernels, which keep no [query, key] array; they are private,
so `fastest_partial` tries them before use. EFFICIENT has not yet run on a GPU.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

logger = logging.getLogger(__name__)

# Added to the logits of pairs that do not attend. Finite, so that a row without any key gives weight 0, never NaN.
EXCLUDED, EXCLUDED_IN_FLOAT16 = -1e30, -6e4

# PyTorch's memory-efficient kernel keeps the log-sum-exp of whole blocks of queries, reads 16 bytes at once, and needs
# the rows of a bias to start at multiples of 16 numbers.
EFFICIENT_BLOCK, READ_AT_ONCE, BIAS_ALIGNMENT = 32, 8, 16


class Keys(NamedTuple):
    """One part of the keys."""

    key: Tensor  # [B, H, K, D]
    value: Tensor  # [B, H, K, D]
    bias: Tensor | None  # added to the logits, broadcasts to [B, H, Q, K], in their dtype


@dataclass(frozen=True)
class Partial:
    """forward(query, keys, scale) -> out [B, H, Q, D], lse [B, H, Q];
    backward(grad_out, query, keys, out, lse, scale, grad_lse) -> gradients of query, key and value; grad_lse [B, H, Q]
    may be None. Results are in float32, or float64 for float64; so are inputs, unless `takes_half`.
    """

    forward: Callable[[Tensor, Keys, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Keys, Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor, Tensor]]
    takes_half: bool = False  # query, key, value, grad_out and out in half precision, as they are


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys of both parts."""
    share = torch.sigmoid(other_lse - lse)  # exp(other_lse) / (exp(lse) + exp(other_lse))
    return torch.lerp(out, other_out, share[..., None]), torch.logaddexp(lse, other_lse)


def attention_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The logit bias of a bool mask, True = attend."""
    excluded = EXCLUDED_IN_FLOAT16 if dtype == torch.float16 else EXCLUDED
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, excluded)


def _logits(query: Tensor, keys: Keys, scale: float) -> Tensor:
    logits = (query * scale) @ keys.key.transpose(-1, -2)
    return logits if keys.bias is None else logits.add_(keys.bias)


def _plain_forward(query: Tensor, keys: Keys, scale: float) -> tuple[Tensor, Tensor]:
    logits = _logits(query, keys, scale)
    lse = logits.logsumexp(-1)
    return logits.sub_(lse[..., None]).exp_() @ keys.value, lse


def _plain_backward(
    grad_out: Tensor, query: Tensor, keys: Keys, out: Tensor, lse: Tensor, scale: float, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    weights = _logits(query, keys, scale).sub_(lse[..., None]).exp_()
    grad_value = weights.transpose(-1, -2) @ grad_out
    delta = (grad_out * out).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse[..., None]
    grad_logits = (grad_out @ keys.value.transpose(-1, -2)).sub_(delta).mul_(weights).mul_(scale)
    return grad_logits @ keys.key, grad_logits.transpose(-1, -2) @ query, grad_value


def _flash_forward(query: Tensor, keys: Keys, scale: float) -> tuple[Tensor, Tensor]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    query, key, value = map(_dense_rows, (query, keys.key, keys.value))
    return flash(query, key, value, attn_mask=keys.bias, scale=scale)


def _dense_rows(tensor: Tensor) -> Tensor:
    """The tensor with contiguous rows, which the kernels below the public functions assume."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _flash_backward(
    grad_out: Tensor, query: Tensor, keys: Keys, out: Tensor, lse: Tensor, scale: float, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if grad_lse is not None:
        return _with_grad_lse(_flash_backward, 1, grad_out, query, keys, out, lse, scale, grad_lse)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    # The kernel reads the log-sum-exp in its own memory order, [B, Q, H].
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    dense = map(_dense_rows, (grad_out, query, keys.key, keys.value, out))
    return flash(*dense, lse, 0.0, False, attn_mask=keys.bias, scale=scale)


def _with_grad_lse(
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    extra: int,
    grad_out: Tensor,
    query: Tensor,
    keys: Keys,
    out: Tensor,
    lse: Tensor,
    scale: float,
    grad_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` with `more` coordinates, 0 in query, key, value, which add -grad_lse to the sum of out * grad_out."""
    longer_keys = Keys(pad(keys.key, (0, extra)), pad(keys.value, (0, extra)), keys.bias)
    out = torch.cat([out, pad(-grad_lse[..., None].to(out.dtype), (0, extra - 1))], -1)
    grads = backward(pad(grad_out, (0, extra), value=1), pad(query, (0, extra)), longer_keys, out, lse, scale, None)
    return grads[0][..., :-extra], grads[1][..., :-extra], grads[2][..., :-extra]


def _efficient_forward(query: Tensor, keys: Keys, scale: float) -> tuple[Tensor, Tensor]:
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    query, key, value = map(_dense_rows, (query, keys.key, keys.value))
    out, lse, _, _ = efficient(query, key, value, _aligned_bias(query, keys), True, scale=scale)
    return out.float(), lse[..., : query.shape[2]]  # it is padded to a whole block


def _efficient_backward(
    grad_out: Tensor, query: Tensor, keys: Keys, out: Tensor, lse: Tensor, scale: float, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if grad_lse is not None:
        return _with_grad_lse(_efficient_backward, READ_AT_ONCE, grad_out, query, keys, out, lse, scale, grad_lse)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention_backward
    lse = pad(lse, (0, -lse.shape[2] % EFFICIENT_BLOCK), value=torch.inf).contiguous()  # padded queries have weight 0
    no_dropout = torch.zeros((), dtype=torch.int64, device=query.device)
    dense = map(_dense_rows, (grad_out, query, keys.key, keys.value))
    tensors = (*dense, _aligned_bias(query, keys), _dense_rows(out), lse, no_dropout, no_dropout)
    grads = efficient(*tensors, 0.0, [True, True, True, False], scale=scale)
    return grads[0].float(), grads[1].float(), grads[2].float()


def _aligned_bias(query: Tensor, keys: Keys) -> Tensor | None:
    """The bias [B, H, Q, K] with rows aligned as the kernel needs them."""
    if keys.bias is None:
        return None
    length = keys.bias.shape[-1]
    rows = pad(keys.bias, (0, -length % BIAS_ALIGNMENT))[..., :length]
    return rows.expand(*query.shape[:3], length)


PLAIN = Partial(_plain_forward, _plain_backward)
FLASH = Partial(_flash_forward, _flash_backward)
EFFICIENT = Partial(_efficient_forward, _efficient_backward, takes_half=True)


@lru_cache  # one trial, and one warning, for each device, dtype and head dimension
def fastest_partial(device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> Partial:
    """FLASH on a CPU, EFFICIENT in half precision on CUDA, where they run and agree with PLAIN on a small example.

    Args:
        dtype: Of the tensors of a call.
        head_dim: EFFICIENT needs multiples of `READ_AT_ONCE`.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type == "cuda" and half and head_dim % READ_AT_ONCE == 0:
        fast, shapes = EFFICIENT, (35, 77, head_dim)
    elif device.type == "cpu":
        fast, shapes, dtype = FLASH, (5, 7, 8), torch.float32 if half else dtype
    else:
        return PLAIN
    try:
        agree = _agree(fast, *shapes, dtype, device)
    except torch.OutOfMemoryError:
        raise  # temporary: the next call tries again
    except (AttributeError, RuntimeError):
        agree = False
    if not agree:
        logger.warning(
            "PyTorch's %s attention does not work here in %s; using slower public operations", device.type, dtype
        )
    return fast if agree else PLAIN


def _agree(
    fast: Partial, num_queries: int, num_keys: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether `fast` agrees with PLAIN, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad_out = (
        torch.randn(2, 2, length, head_dim, generator=generator).to(device, dtype)
        for length in (num_queries, num_keys, num_keys, num_queries)
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grad_lse = grad_out[..., 0].to(wide)
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).triu()
    scale = head_dim**-0.5

    def results(one: Partial, dtype: torch.dtype) -> tuple[Tensor, ...]:
        q, k, v, do = (tensor.to(dtype) for tensor in (query, key, value, grad_out))
        keys = Keys(k, v, attention_bias(mask, dtype))
        out, lse = one.forward(q, keys, scale)
        return out, lse, *one.backward(do, q, keys, out.to(dtype), lse, scale, grad_lse)

    rtol, atol = (1e-4, 1e-5) if dtype == wide else (2e-2, 2e-2)
    pairs = zip(results(fast, dtype), results(PLAIN, wide), strict=True)
    return all(torch.allclose(one, other, rtol=rtol, atol=atol) for one, other in pairs)
