"""Softmax attention over a part of the keys, in a form that can be put together with other parts.

With logits s_ij = scale * q_i . k_j + bias_ij, a part gives its own average and its log-sum-exp

    out_i = sum_j exp(s_ij - lse_i) v_j        lse_i = log sum_j exp(s_ij)

and two parts join, exactly, to the softmax over both (`merge`). In backward every part is given the joined `out`
and `lse`: exp(s_ij - lse_i) is then the weight in the whole softmax, and the gradients of the parts add up. The
gradient of lse itself, where it is used, adds exp(s_ij - lse_i) grad_lse_i to that of each logit.

Two implementations of one interface, in float32 and float64: `PLAIN` is public operations; `FLASH` is
PyTorch's own kernel for CPUs, which keeps no [query, key] array, but is private: `fastest_partial` tries it first.
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
EXCLUDED = -1e30


class Keys(NamedTuple):
    """One part of the keys."""

    key: Tensor  # [B, H, K, D]
    value: Tensor  # [B, H, K, D]
    bias: Tensor | None  # added to the logits, broadcasts to [B, H, Q, K]


@dataclass(frozen=True)
class Partial:
    """forward(query, keys, scale) -> out [B, H, Q, D], lse [B, H, Q];
    backward(grad_out, query, keys, out, lse, scale, grad_lse) -> gradients of query, key and value; grad_lse [B, H, Q]
    may be None.
    """

    forward: Callable[[Tensor, Keys, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Keys, Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor, Tensor]]


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys of both parts."""
    share = torch.sigmoid(other_lse - lse)  # exp(other_lse) / (exp(lse) + exp(other_lse))
    return torch.lerp(out, other_out, share[..., None]), torch.logaddexp(lse, other_lse)


def attention_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """bool mask, True = attend -> what is added to the logits."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, EXCLUDED)


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
    """The kernels below the public functions read D numbers in a row, wherever the tensor has them."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _flash_backward(
    grad_out: Tensor, query: Tensor, keys: Keys, out: Tensor, lse: Tensor, scale: float, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if grad_lse is not None:
        # One more coordinate, 0 in query, key and value: out * grad_out, which the kernel sums, has -grad_lse there.
        longer = Keys(pad(keys.key, (0, 1)), pad(keys.value, (0, 1)), keys.bias)
        grad_out, out = pad(grad_out, (0, 1), value=1), torch.cat([out, -grad_lse[..., None]], -1)
        grads = _flash_backward(grad_out, pad(query, (0, 1)), longer, out, lse, scale, None)
        return grads[0][..., :-1], grads[1][..., :-1], grads[2][..., :-1]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    # The kernel reads the log-sum-exp in its own memory order, [B, Q, H].
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    dense = map(_dense_rows, (grad_out, query, keys.key, keys.value, out))
    return flash(*dense, lse, 0.0, False, attn_mask=keys.bias, scale=scale)


PLAIN = Partial(_plain_forward, _plain_backward)
FLASH = Partial(_flash_forward, _flash_backward)


@lru_cache  # one trial, and one warning, for each device and dtype
def fastest_partial(device_type: str, dtype: torch.dtype) -> Partial:
    """FLASH on a CPU where it runs and agrees with PLAIN on a small example, else PLAIN."""
    if device_type != "cpu":
        return PLAIN
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad_out = (
        torch.randn(2, 2, length, 8, generator=generator).to(dtype) for length in (5, 7, 7, 5)
    )
    grad_lse = grad_out[..., 0]
    mask = torch.ones(5, 7, dtype=torch.bool).triu()
    keys = Keys(key, value, attention_bias(mask, dtype))
    out, lse = PLAIN.forward(query, keys, 0.5)
    expected = (out, lse, *PLAIN.backward(grad_out, query, keys, out, lse, 0.5, grad_lse))
    try:
        computed = (*FLASH.forward(query, keys, 0.5), *FLASH.backward(grad_out, query, keys, out, lse, 0.5, grad_lse))
        agree = all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(computed, expected, strict=True))
    except (AttributeError, RuntimeError):
        agree = False
    if not agree:
        logger.warning("PyTorch's CPU flash attention does not work here in %s; using slower public operations", dtype)
    return FLASH if agree else PLAIN
