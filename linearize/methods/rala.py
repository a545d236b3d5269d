"""Rank-augmented linear attention (RALA, arXiv:2411.07635): keys that matter weigh more in the state.

    x_i = phi(q_i) S / (phi(q_i) . m),   S = sum_j a_j phi(k_j)^T v_j,   m = sum_j a_j phi(k_j)
    a = softmax_j(D**-0.5 mean_i(phi(q_i)) . phi(k_j)),   phi(x) = elu(x) + 1,   j over the tokens of the image

The weights a raise the rank of the state S. The paper's second half, factors that raise the rank of the result, is the
option `gate` (`local_terms.py`): computed from values, where the paper projects the module's input, and initially 1.
Text keeps softmax attention (`joint.py`).

The published code differs with rotary positions: it rotates phi(q) and phi(k) in the numerator only. Here phi is taken
of the base's rotated queries and keys, in numerator and denominator, and rows of weights sum to 1.
"""

from dataclasses import dataclass

from ...kernels.linear import rala_attention
from .linear_image import LinearImage, LinearImageAttention


@dataclass(frozen=True, kw_only=True)
class Rala(LinearImage):
    """Config of rank-augmented linear attention, with the attributes of `LinearImage`."""


class RalaAttention(LinearImageAttention):
    """Rank-augmented linear attention as the kernel of one attention module."""

    kernel = staticmethod(rala_attention)
