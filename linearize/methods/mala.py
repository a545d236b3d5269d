"""Magnitude-aware linear attention (MALA, arXiv:2507.00698): weights grow with |phi(q)|, and rows sum to 1.

    x_i = sum_j ((1 + 1 / z_i) s_ij - z_i) v_j / N,   s_ij = D**-0.5 phi(q_i) . phi(k_j),   z_i = mean_j s_ij
    phi(x) = elu(x) + 1,   j over the N tokens of the image

Plain linear attention gives q and 2 q nearly the same weights; here the larger query has sharper weights, as in
softmax. Weights may be negative. The paper's LePE and gate are options (`local_terms.py`); the gate is computed from
values where the paper projects the module's input. Text keeps softmax attention (`joint.py`).

The published code differs from the formula with rotary positions: it rotates phi(q) and phi(k) in the first term only,
and takes z and the second term from the unrotated ones, so that its rows do not sum to 1. Here phi is applied to the
base's rotated queries and keys in both terms, and rows sum to 1.
"""

from dataclasses import dataclass

from ...kernels.linear import mala_attention
from .linear_image import LinearImage, LinearImageAttention


@dataclass(frozen=True, kw_only=True)
class Mala(LinearImage):
    """Config of magnitude-aware linear attention, with the attributes of `LinearImage`."""


class MalaAttention(LinearImageAttention):
    """Magnitude-aware linear attention as the kernel of one attention module."""

    kernel = staticmethod(mala_attention)
