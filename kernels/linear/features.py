"""Shared by the linear operators: the feature map, and the chunks of tokens that they process one at a time.

phi(x) = elu(x) + 1 = max(x, 0) + exp(min(x, 0))        phi'(x) = exp(min(x, 0))
"""

from collections.abc import Iterator

from torch import Tensor

from ..pieces.results import sum_dtype

CHUNK_NUMBERS = 2**24  # elements of one tensor per chunk: 64 MiB in float32


def feature_map(x: Tensor) -> Tensor:
    """phi(x) in float32, or float64 for float64; in half precision elu(x) + 1 would lose all small values."""
    x = x.to(sum_dtype(x))
    return x.relu() + x.clamp(max=0).exp()  # autograd's slope at 0 is 1


def feature_slope(x: Tensor) -> Tensor:
    """phi'(x), dtype as of `feature_map`."""
    return x.to(sum_dtype(x)).clamp(max=0).exp()


def to_sum_dtype(x: Tensor) -> Tensor:
    """x in the dtype of sums."""
    return x.to(sum_dtype(x))


def chunks(x: Tensor) -> Iterator[slice]:
    """Slices that together cover the tokens of x [B, H, N, D]."""
    batch, num_heads, num_tokens, head_dim = x.shape
    size = max(1, CHUNK_NUMBERS // max(1, batch * num_heads * head_dim))
    for start in range(0, num_tokens, size):
        yield slice(start, start + size)
