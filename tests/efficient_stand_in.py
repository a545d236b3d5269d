"""A stand-in for PyTorch's memory-efficient attention, which needs CUDA: its input requirements and results."""

import torch
from torch import Tensor

BLOCK = 32  # queries


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert compute_log_sumexp and not (dropout_p or is_causal)
    _check(query, key, value, attn_bias)
    logits = _logits(query, key, attn_bias, scale)
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp().to(query.dtype)  # rounded, as tensor cores take them
    missing = -query.shape[2] % BLOCK
    unused = torch.zeros((), dtype=torch.int64)
    out = (weights.float() @ value.float()).to(query.dtype)
    return out, torch.nn.functional.pad(lse, (0, missing), value=torch.inf), unused, unused


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    offset: Tensor,
    dropout_p: float,
    grad_input_mask: list[bool],
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, None]:
    assert grad_input_mask == [True, True, True, False] and not dropout_p
    _check(query, key, value, attn_bias)
    _check(out, key, grad_out, None)
    assert lse.dtype == torch.float32 and lse.is_contiguous()
    assert lse.shape == (*query.shape[:2], -(-query.shape[2] // BLOCK) * BLOCK)
    weights = (_logits(query, key, attn_bias, scale) - lse[..., : query.shape[2], None]).exp()
    delta = (out.float() * grad_out.float()).sum(-1, keepdim=True)
    grad_logits = scale * weights * (grad_out.float() @ value.float().mT - delta)
    grad_logits, weights = (tensor.to(query.dtype).float() for tensor in (grad_logits, weights))
    grads = grad_logits @ key.float(), grad_logits.mT @ query.float(), weights.mT @ grad_out.float()
    return (*(grad.to(query.dtype) for grad in grads), None)  # type: ignore[return-value]


def _logits(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = scale * query.float() @ key.float().mT
    return logits if bias is None else logits + bias.float()


def _check(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> None:
    for tensor in (query, key, value):
        assert tensor.dtype == query.dtype and tensor.dtype in (torch.float16, torch.bfloat16)
        assert tensor.stride(-1) == 1
        assert all(step % 8 == 0 for step in tensor.stride()[:3])  # 16 bytes are read at once
    if bias is not None:
        assert bias.dtype == query.dtype
        assert bias.shape == (*query.shape[:3], key.shape[2])
        assert bias.stride(-1) == 1
        assert all(step % 8 == 0 for step in bias.stride()[:3])
