"""Base of methods that sum the image into one D x D state per head: `mala.py` and `rala.py` have the formulas.

    x = g * (kernel(q, k, v) + LocalConv(v)),   g = ValueGate(v)

B batch, H heads, N tokens, n of them of the image, D head dimension, C = H * D channels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...kernels.linear import implementations
from ..layout import Grid
from .field_checks import check_bool, check_count
from .joint import JointMethod, joint_pairs
from .local_terms import LocalConv, ValueGate


@dataclass(frozen=True, kw_only=True)
class LinearImage:
    """Config; additional parameters are initialized to have no effect.

    Attributes:
        conv_size: Side in tokens of the depth-wise convolution of values, odd; None: none.
        gate: Multiply the result elementwise by a learned gate of the values.
        balance: Learn, for each head, to shift weight between text and image. For models that attend to both in one
            call; elsewhere it has no gradient.
    """

    conv_size: int | None = None
    gate: bool = False
    balance: bool = False

    def __post_init__(self) -> None:
        check_count("conv_size", self.conv_size, least=3, odd=True, optional=True)
        check_bool("gate", self.gate)
        check_bool("balance", self.balance)


class LinearImageAttention(JointMethod):
    """The kernel of one attention module; `kernel(query, key, value, impl=...)` is linear attention of the image."""

    kernel: ClassVar[Callable[..., Tensor]]

    def __init__(self, config: LinearImage, *, num_heads: int, head_dim: int) -> None:
        super().__init__(config, num_heads=num_heads, head_dim=head_dim)
        shape = {"num_heads": num_heads, "head_dim": head_dim}
        self.conv = LocalConv(config.conv_size, **shape) if config.conv_size is not None else None
        self.gate = ValueGate(**shape) if config.gate else None

    @staticmethod
    def implementations() -> tuple[str, ...]:
        """Names that `impl` may take."""
        return ("auto", *implementations())

    @staticmethod
    def pairs(config: LinearImage, grid: Grid, text_len: int, *, num_heads: int, head_dim: int) -> int:
        """Pairs of equal cost: 2 n D C for the state, for its use and for the gate each, 2 n k^2 C for the conv."""
        num_image = math.prod(grid)
        per_token = 2 * head_dim + (config.conv_size or 0) ** 2 + (head_dim if config.gate else 0)
        return joint_pairs(num_image * per_token // 2, num_image, text_len, head_dim)

    def attend_to_image(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float) -> Tensor:
        """x above, of the image's tokens [B, H, n, D] -> [B, H, n, D]."""
        out = self.kernel(query, key, value, impl=self.impl)
        if self.conv is not None:
            out = out + self.conv(value, grid)
        return out if self.gate is None else out * self.gate(value)
