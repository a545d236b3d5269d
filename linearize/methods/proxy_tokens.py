"""Proxy tokens (PT-DiT, arXiv:2409.04005): every token attends to one proxy for each cell of the image.

    x_i = sum_c softmax_c(scale q_i . k_c) (v_c + g (y_c - v_c)),   y_c = sum_d softmax_d(scale q_c . k_d) v_d

q_c, k_c and v_c are the means of a cell of tokens, its proxy; c and d are any of the `num_proxies` cells, on the grid
of `kernels/pieces/cells.py`. First the proxies attend to each other, which gives y; then every token attends to
the proxies. The number of cells is fixed, so cost is linear. Text keeps softmax attention (`joint.py`).

Differences from the paper, which trains a model from scratch: there, proxies are means of the block's input, the second
attention has its own projections, and windows follow it (`Hybrid` adds one). A module of the base has one set of
projections, so here proxies are means of their outputs. g, learned for each head, starts at 0, where a token gets the
proxies' own values: softmax attention with cells as keys. At 1 it gets the outputs of the proxies' attention, as in the
paper; before training that is further from the base, since it smooths twice.

B batch, H heads, n tokens of the image, D head dimension, C = num_proxies.
"""

import math
from dataclasses import dataclass

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ...kernels.pieces.cell_means import cell_means
from ..layout import Grid
from .field_checks import check_bool, check_count
from .joint import JointMethod, joint_pairs


@dataclass(frozen=True, kw_only=True)
class ProxyTokens:
    """Config of attention through proxy tokens; additional parameters are initialized to have no effect.

    Attributes:
        num_proxies: Number of proxies, at any image size; one with many divisors, such as 64, fits most shapes.
        balance: Learn, for each head, to shift weight between text and image. For models that attend to both in one
            call; elsewhere it has no gradient.
    """

    num_proxies: int
    balance: bool = False

    def __post_init__(self) -> None:
        check_count("num_proxies", self.num_proxies)
        check_bool("balance", self.balance)


class ProxyTokensAttention(JointMethod):
    """Attention through proxy tokens as the kernel of one attention module; `gate` [H] is g."""

    def __init__(self, config: ProxyTokens, *, num_heads: int, head_dim: int) -> None:
        super().__init__(config, num_heads=num_heads, head_dim=head_dim)
        self.gate = nn.Parameter(torch.zeros(num_heads))

    @staticmethod
    def pairs(config: ProxyTokens, grid: Grid, text_len: int, *, num_heads: int, head_dim: int) -> int:
        """Pairs of query and key: proxies with each other, each token with the proxies."""
        num_image = math.prod(grid)
        return joint_pairs((num_image + config.num_proxies) * config.num_proxies, num_image, text_len, head_dim)

    def attend_to_image(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float) -> Tensor:
        """x above, [B, H, n, D] -> [B, H, n, D]."""
        proxy_key, proxy_value = self.proxies(query, key, value, grid, scale)
        return scaled_dot_product_attention(query, proxy_key, proxy_value, scale=scale)

    @apply_forward_hook  # sequential offload must load the weights when a hybrid calls only this
    def proxies(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float) -> tuple[Tensor, Tensor]:
        """k_c and v_c + g (y_c - v_c) above, of the image's tokens; [B, H, n, D] -> [B, H, C, D] each."""
        proxy_query, proxy_key, proxy_value = (
            cell_means(tokens, *grid[-2:], self.config.num_proxies).to(tokens.dtype) for tokens in (query, key, value)
        )
        attended = scaled_dot_product_attention(proxy_query, proxy_key, proxy_value, scale=scale)
        gate = self.gate[:, None, None].to(proxy_value.dtype)
        return proxy_key, (proxy_value + gate * (attended - proxy_value)).to(value.dtype)
