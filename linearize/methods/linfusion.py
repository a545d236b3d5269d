"""Generalized linear attention (LinFusion, arXiv:2409.02097): one D x D state per head for all tokens.

    out_i = phi(q_i) S / (phi(q_i) . z + eps),   S = 1/N sum_j phi(k_j) v_j^T,   z = 1/N sum_j phi(k_j)
    phi(x) = elu(x) + 1,   q = W_q (x + f_q(x)),   k = W_k (x + f_k(x)),   v = W_v x

x is the input of the attention module, f_q and f_k are small networks, trained together with the projections W:
f(x) = Linear(leaky_relu(LayerNorm(Linear(x)))). eps = 1e-4, as in the published weights' training.

B batch, H heads, N tokens of the image, D head dimension, C = H * D channels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor, nn

from ...kernels.linear.features import feature_map, to_sum_dtype
from ...kernels.pieces.autocast import without_autocast
from ..errors import LayoutError
from ..layout import Grid, Layout
from .field_checks import check_count
from .method import Method

EPSILON = 1e-4


@dataclass(frozen=True, kw_only=True)
class LinFusion:
    """Config of generalized linear attention.

    Attributes:
        projection_channels: Hidden channels of f_q and f_k; None: C; 0: no networks, f(x) = x.
    """

    projection_channels: int | None = None

    def __post_init__(self) -> None:
        check_count("projection_channels", self.projection_channels, least=0, optional=True)


class InputTerm(nn.Sequential):
    """f_q or f_k; its last layer starts at zero, so that an untrained one changes nothing."""

    def __init__(self, channels: int, hidden: int) -> None:
        last = nn.Linear(hidden, channels)
        super().__init__(nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.LeakyReLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C], in the precision of its own weights."""
        # layerwise casting stores Linear layers in float8 between calls, and leaves norms as they are
        return super().forward(x.to(cast(Tensor, self[1].weight).dtype)).to(x.dtype)


class LinFusionAttention(Method):
    """Generalized linear attention as the kernel of one attention module, with the networks f_q and f_k."""

    input_terms: ClassVar[Mapping[str, str]] = {"to_q": "query_term", "to_k": "key_term"}
    shared_across_heads = True
    image_alone = True

    def __init__(self, config: LinFusion, *, num_heads: int, head_dim: int) -> None:
        super().__init__(config, num_heads=num_heads, head_dim=head_dim)
        channels = num_heads * head_dim
        hidden = _hidden(config, channels)
        self.query_term = InputTerm(channels, hidden) if hidden else nn.Identity()
        self.key_term = InputTerm(channels, hidden) if hidden else nn.Identity()

    @staticmethod
    def pairs(config: LinFusion, grid: Grid, text_len: int, *, num_heads: int, head_dim: int) -> int:
        """Pairs of equal cost: 2 N D C for the state and for its use each, 4 N C hidden for f_q and f_k each."""
        return math.prod(grid) * (head_dim + 2 * _hidden(config, num_heads * head_dim))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float | None = None
    ) -> Tensor:
        """[B, H, N, D] -> [B, H, N, D]; there are no logits, so `scale` is ignored."""
        if layout.text_len > 0:
            raise LayoutError(
                f"LinFusion needs self-attention over image tokens only, got {layout.text_len} text tokens in the same "
                "call: use it for UNets, or use another method for this model"
            )
        return linear_attention(query, key, value)


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The formula above after the projections; all [B, H, N, D]. Sums are in float32, or float64 for float64."""
    with without_autocast(query):
        phi_query, phi_key = feature_map(query), feature_map(key)
        state = phi_key.mT @ to_sum_dtype(value) / key.shape[2]  # [B, H, D, D]
        normalizer = phi_query @ phi_key.mean(dim=2, keepdim=True).mT + EPSILON  # [B, H, N, 1]
        return (phi_query @ state / normalizer).to(value.dtype)


def _hidden(config: LinFusion, channels: int) -> int:
    return channels if config.projection_channels is None else config.projection_channels
