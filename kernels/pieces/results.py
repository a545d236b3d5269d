"""Results of attention: the dtype of sums, names of dtypes, and the memory layout."""

import torch
from torch import Tensor


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of logits, sums and log-sum-exp: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in configs and files, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def token_major(like: Tensor, num_tokens: int) -> Tensor:
    """An empty [B, H, num_tokens, D] with memory in the order [B, num_tokens, H, D]."""
    batch, num_heads, _, head_dim = like.shape
    return like.new_empty(batch, num_tokens, num_heads, head_dim).transpose(1, 2)
