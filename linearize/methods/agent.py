"""Agent attention (arXiv:2312.08874): a fixed number of agents attend to all tokens, every token to the agents.

    x = softmax(second_scale Q A^T + B_2) softmax(scale A K^T + B_1) V + shortcut V + LocalConv(V)

A are the image's queries, pooled over the grid (`kernels/pieces/cell_means.py`); B_1 and B_2 are learned tables over
the offset of a token from an agent, spread over any grid. second_scale = scale**second_scale_exponent. Text keeps
softmax attention (`joint.py`).

Without training, on a Stable Diffusion UNet (AgentSD): `Agent(num_agents=..., second_scale_exponent=0.3,
shortcut=0.075)` for the first denoising steps, and the base's attention for the rest, which `first_steps` switches:

    linearize_(pipe, Agent(num_agents=256, second_scale_exponent=0.3, shortcut=0.075), min_tokens=4096)
    with first_steps(pipe, 20) as on_step_end:
        pipe(prompt, num_inference_steps=50, callback_on_step_end=on_step_end)

AgentSD picks a share of the tokens as agents, by similarity; here their number is fixed, so that cost is linear.

B batch, H heads, N tokens, D head dimension, C = H * D channels.
"""

import math
from dataclasses import dataclass

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from ...kernels.agent import agent_attention, implementations
from ...kernels.agent.agent_bias import agent_bias
from ...kernels.pieces.cell_means import cell_means
from ..layout import Grid
from .field_checks import check_bool, check_count, check_finite
from .joint import JointMethod, joint_pairs
from .local_terms import LocalConv


@dataclass(frozen=True, kw_only=True)
class Agent:
    """Config of agent attention; additional parameters are initialized to have no effect.

    Attributes:
        num_agents: Number of agents, at any image size; one with many divisors, such as 64, fits most shapes.
        conv_size: Side in tokens of the depth-wise convolution of values, odd; None: none.
        bias_size: Side of the two position bias tables of each head, odd; None: none.
        second_scale_exponent: Exponent of the scale of queries against agents; 1: the scale of agents against keys;
            lower is sharper.
        shortcut: Factor of the token's own value that is added to its output.
        balance: Learn, for each head, to shift weight between text and image. For models that attend to both in one
            call; elsewhere it has no gradient.
    """

    num_agents: int
    conv_size: int | None = None
    bias_size: int | None = None
    second_scale_exponent: float = 1.0
    shortcut: float = 0.0
    balance: bool = False

    def __post_init__(self) -> None:
        check_count("num_agents", self.num_agents)
        check_count("conv_size", self.conv_size, least=3, odd=True, optional=True)
        check_count("bias_size", self.bias_size, least=3, odd=True, optional=True)
        check_finite("second_scale_exponent", self.second_scale_exponent, least=0)
        check_finite("shortcut", self.shortcut, least=0)
        check_bool("balance", self.balance)


class AgentAttention(JointMethod):
    """Agent attention as the kernel of one attention module; `key_bias` and `query_bias` [H, R, R] are B_1 and B_2."""

    def __init__(self, config: Agent, *, num_heads: int, head_dim: int) -> None:
        super().__init__(config, num_heads=num_heads, head_dim=head_dim)
        shape = {"num_heads": num_heads, "head_dim": head_dim}
        self.conv = LocalConv(config.conv_size, **shape) if config.conv_size is not None else None
        if config.bias_size is not None:
            self.key_bias = nn.Parameter(torch.zeros(num_heads, config.bias_size, config.bias_size))
            self.query_bias = nn.Parameter(torch.zeros(num_heads, config.bias_size, config.bias_size))

    @staticmethod
    def implementations() -> tuple[str, ...]:
        """Names that `impl` may take."""
        return ("auto", *implementations())

    @staticmethod
    def pairs(config: Agent, grid: Grid, text_len: int, *, num_heads: int, head_dim: int) -> int:
        """Pairs of equal cost: each agent with each token, twice; 2 n k^2 C for the conv."""
        num_image = math.prod(grid)
        per_token = 4 * config.num_agents + (config.conv_size or 0) ** 2
        return joint_pairs(num_image * per_token // 2, num_image, text_len, head_dim)

    @apply_forward_hook  # sequential offload must load the weights when a hybrid calls only this
    def attend_to_image(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float) -> Tensor:
        """x above, of the image's tokens [B, H, n, D] -> [B, H, n, D]."""
        height, width = grid[-2:]
        num_agents = self.config.num_agents
        key_bias = query_bias = None
        if self.config.bias_size is not None:
            sizes = (query.shape[2], height, width, num_agents)
            key_bias = agent_bias(self.key_bias, *sizes)[None].to(query.dtype)
            query_bias = agent_bias(self.query_bias, *sizes).mT[None].to(query.dtype)
        out = agent_attention(
            query,
            key,
            value,
            cell_means(query, height, width, num_agents).to(query.dtype),
            scale=scale,
            second_scale=scale**self.config.second_scale_exponent,
            shortcut=self.config.shortcut,
            key_bias=key_bias,
            query_bias=query_bias,
            impl=self.impl,
        )
        return out if self.conv is None else out + self.conv(value, grid)
