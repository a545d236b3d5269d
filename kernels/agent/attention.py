"""Agent attention (arXiv:2312.08874): agents attend to all tokens, and every query attends to the agents.

    out = softmax(second_scale Q A^T + query_bias) softmax(scale A K^T + key_bias) V + shortcut V

The implementations:

    reference   both weight matrices in memory
    torch       two calls of PyTorch's attention; time and memory linear in N for a fixed number of agents
"""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..pieces.autocast import as_autocast, without_autocast
from ..pieces.checks import check_attention, check_devices
from .reference import agent_attention_reference


def implementations() -> tuple[str, ...]:
    """Values of `impl` other than "auto", which is "torch"."""
    return ("reference", "torch")


def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    *,
    scale: float | None = None,
    second_scale: float | None = None,
    shortcut: float = 0.0,
    key_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention through agents.

    Args:
        query, key, value: [B, H, N, D].
        agents: [B, H, A, D], A > 0.
        scale: Scale of the logits of agents and keys; None: D**-0.5.
        second_scale: Scale of the logits of queries and agents; None: `scale`.
        shortcut: Factor of the token's own value that is added to its output.
        key_bias: Added to the logits of agents and keys; 2 to 4 dimensions that broadcast to [B, H, A, N].
        query_bias: Added to the logits of queries and agents; 2 to 4 dimensions that broadcast to [B, H, N, A].
        impl: "auto" or one of `implementations()`.
    Returns:
        [B, H, N, D], dtype of value (under autocast, the autocast dtype).
    Raises:
        ValueError: invalid shapes, biases, devices or impl.
    """
    check_attention(query, key, value, impl, implementations())
    _check_agents(query, agents)
    batch, num_heads, num_tokens, _ = query.shape
    _check_bias("key_bias", key_bias, (batch, num_heads, agents.shape[2], num_tokens), query)
    _check_bias("query_bias", query_bias, (batch, num_heads, num_tokens, agents.shape[2]), query)
    query, key, value, agents = as_autocast(query, key, value, agents)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    second_scale = scale if second_scale is None else second_scale
    if impl == "reference":
        with without_autocast(query):
            return agent_attention_reference(
                query,
                key,
                value,
                agents,
                scale=scale,
                second_scale=second_scale,
                shortcut=shortcut,
                key_bias=key_bias,
                query_bias=query_bias,
            )
    gathered = scaled_dot_product_attention(agents, key, value, attn_mask=key_bias, scale=scale)
    out = scaled_dot_product_attention(query, agents, gathered, attn_mask=query_bias, scale=second_scale)
    return out if shortcut == 0 else out + shortcut * value


def _check_agents(query: Tensor, agents: Tensor) -> None:
    batch, num_heads, _, head_dim = query.shape
    expected = (batch, num_heads, agents.shape[-2] if agents.ndim > 1 else 0, head_dim)
    if agents.shape != expected or agents.shape[2] == 0:
        raise ValueError(f"agents must be [B, H, A, D] like query, A > 0, got {tuple(agents.shape)}")
    check_devices(query, agents=agents)


def _check_bias(name: str, bias: Tensor | None, shape: tuple[int, ...], query: Tensor) -> None:
    if bias is None:
        return
    broadcasts = bias.ndim in (2, 3, 4) and all(
        size in (1, full) for size, full in zip(bias.shape[::-1], shape[::-1], strict=False)
    )
    if not broadcasts or not bias.is_floating_point():
        raise ValueError(
            f"{name} must be floating point and broadcast to {shape}, got {bias.dtype} {tuple(bias.shape)}"
        )
    check_devices(query, **{name: bias})
