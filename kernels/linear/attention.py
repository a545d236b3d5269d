"""Variants of linear attention that avoid its nearly uniform weights.

    mala   magnitude-aware (arXiv:2507.00698): weights scale with |phi(q)|, as in softmax; rows sum to 1
    rala   rank-augmented (arXiv:2411.07635): keys are weighted by their attention from the mean query; rows sum to 1

Both: phi(x) = elu(x) + 1. The implementations:

    reference   all pairs in one N x N matrix; any device
    torch       two passes over the tokens, in chunks; any device; time and memory linear in N
"""

from torch import Tensor

from ..pieces.autocast import without_autocast
from ..pieces.checks import check_attention
from .mala import mala_op
from .rala import rala_op
from .reference import mala_attention_reference, rala_attention_reference


def implementations() -> tuple[str, ...]:
    """Values of `impl` other than "auto", which is "torch"."""
    return ("reference", "torch")


def mala_attention(query: Tensor, key: Tensor, value: Tensor, *, eps: float = 1e-6, impl: str = "auto") -> Tensor:
    """Magnitude-aware linear attention over all tokens.

        out_i = sum_j ((1 + 1 / (z_i + eps)) s_ij - z_i) v_j / N,
        s_ij = D**-0.5 phi(q_i) . phi(k_j),   z_i = mean_j s_ij

    Differentiable once.

    Args:
        query, key, value: [B, H, N, D], any strides; float16, bfloat16, float32 or float64.
        eps: Keeps 1 / z finite, in (0, 1); a row of weights sums to z / (z + eps).
        impl: "auto" or one of `implementations()`.
    Returns:
        [B, H, N, D], dtype of value; sums are in float32, or float64 for float64, under autocast too.
    Raises:
        ValueError: invalid shapes, eps or impl.
    """
    _validate(query, key, value, eps, impl)
    if impl == "reference":
        with without_autocast(query):
            return mala_attention_reference(query, key, value, eps=eps)
    return mala_op(query, key, value, eps)[0]


def rala_attention(query: Tensor, key: Tensor, value: Tensor, *, eps: float = 1e-6, impl: str = "auto") -> Tensor:
    """Rank-augmented linear attention over all tokens.

        out_i = phi(q_i) (sum_j a_j phi(k_j)^T v_j) / (phi(q_i) . sum_j a_j phi(k_j) + eps),
        a = softmax_j(D**-0.5 g . phi(k_j)),   g = mean_i phi(q_i)

    Arguments, result and errors are those of `mala_attention`.
    """
    _validate(query, key, value, eps, impl)
    if impl == "reference":
        with without_autocast(query):
            return rala_attention_reference(query, key, value, eps=eps)
    return rala_op(query, key, value, eps)[0]


def _validate(query: Tensor, key: Tensor, value: Tensor, eps: float, impl: str) -> None:
    check_attention(query, key, value, impl, implementations())
    if query.shape[2] == 0:
        raise ValueError(f"there must be a token to attend to, got {tuple(query.shape)}")
    if not 0 < eps < 1:
        raise ValueError(f"eps must be > 0 and < 1, got {eps}")
