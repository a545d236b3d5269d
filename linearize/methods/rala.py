"""Rank-augmented linear attention (RALA, arXiv:2411.07635): keys that matter weigh more in the state.

    x_i = phi(q_i) S / (phi(q_i) . m),   S = sum_j a_j phi(k_j)^T v_j,   m = sum_j a_j phi(k_j)
    a = softmax_j(D**-0.5 mean_i(phi(q_i)) . phi(k_j)),   phi(x) = elu(x) + 1,   j over the tokens of the image

The weights a raise the rank of the state S. The paper's second half, factors that raise the rank of the result, is the
option `gate` (`local_terms.py`): of values, where the paper projects the module's input, and 1 at the start. Text stays
under softmax: `joint.py` says how a query is shared.

Where the published code departs: with rotary positions it rotates phi(q) and phi(k) above the fraction line alone. Here
phi is taken of what the base has rotated, above and below, and rows of weights sum to 1.
"""

from dataclasses import dataclass

from ...kernels.linear import rala_attention
from .linear_image import LinearImage, LinearImageAttention


@dataclass(frozen=True, kw_only=True)
class Rala(LinearImage):
    """Config of rank-augmented linear attention, those of `LinearImage`."""


class RalaAttention(LinearImageAttention):
    """Rank-augmented linear attention as the kernel of one attention module."""

    kernel = staticmethod(rala_attention)
