"""Focus: outside a window, cells with the largest weights are read token by token, the others through proxies.

    far_i = sum_c exp(s_ic - lse_i) v_c + sum_j exp(s_ij - lse_i) v_j      c not chosen, j a token of a chosen cell
    lse_i = log (sum_c exp(s_ic) + sum_j exp(s_ij))

    s_ic = scale q_i . k_c + log r_ic        k_c, v_c the proxy of cell c; r_ic its tokens outside of the window of i
    s_ij = scale q_i . k_j - log (m_j n/C)   j outside of the window of i; m_j the number of cells that hold token j

r and m are those of rest_of_cells.py, r in units of n / C tokens. If every cell is chosen, far is softmax over the
image outside the window; if none is, softmax over the proxies. The queries of a tile of `side` x `side` choose
together, by the largest

    scale q_t . k_c + log r_tc             q_t the mean of the tile's queries, r_tc that of its r_ic

as many cells as hold `num_tokens` tokens (`cells_in_focus`), so cost is linear; the choice has no gradient. Where cells
overlap, a token counts 1/m_j in each of the cells that hold it, chosen or not.

NSA (arXiv:2502.11089) has the same three views of a sequence, near, compressed and selected, each with its own softmax,
and learned gates and compression; MoBA (arXiv:2502.13189) chooses blocks by their mean key; SLA (arXiv:2509.24006)
leaves the rest to linear attention. Here everything is in one softmax with the base model's weights, close to its
attention before any training.

B batch, H heads, n = frames * height * width tokens, C cells, k of them chosen, L tokens of the largest cell, K = k L,
G tiles of Q = side * side queries, D head dimension.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..pieces.cells import Grid, sizes_of
from ..pieces.checks import check_attention, check_devices
from ..pieces.results import sum_dtype, token_major
from ..pieces.table_cache import CACHES_TABLES
from ..window.windows import Window, from_arguments, to_arguments
from .choose import IMPLEMENTATIONS, backward_blocks, blocks_for, choose_impl, division_is_exact
from .plain import plain_backward, plain_forward


def cells_in_focus(num_tokens: int, num_cells: int, grid: Grid) -> int:
    """k: the number of cells that hold `num_tokens` tokens in total; 0 if a single cell holds more."""
    return min(num_cells, num_tokens * num_cells // math.prod(grid))


def focus_pairs(num_tokens: int, num_cells: int, side: int, grid: Grid) -> int:
    """Pairs of a query and a token of a chosen cell, and of a tile and a cell that it may choose."""
    count = cells_in_focus(num_tokens, num_cells, grid)
    if count == 0:
        return 0
    frames, height, width = sizes_of(grid)
    tiles = frames * math.ceil(height / side) * math.ceil(width / side)
    return math.prod(grid) * math.ceil(count * math.prod(grid) / num_cells) + tiles * num_cells


def focus_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proxy_key: Tensor,
    proxy_value: Tensor,
    *,
    grid: Grid,
    window: Window,
    num_tokens: int,
    side: int,
    scale: float,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`far` and `lse` of the module's formula; differentiable once.

    Args:
        query, key, value: [B, H, n, D], the image's tokens.
        proxy_key, proxy_value: [B, H, C, D].
        grid: Size of the image in tokens; `cells_in_focus` must be at least 1 for it.
        window: The window whose tokens are excluded.
        num_tokens: Number of tokens that each query reads individually.
        side: Side of the tiles in tokens.
        scale: Scale of the logits.
        impl: "plain", "triton", or "auto": the Triton kernels if they run, otherwise "plain".
    Returns:
        [B, H, n, D], and [B, H, n] in float32, or float64 for float64; lse counts in units of n / C tokens.
    Raises:
        ValueError: invalid shapes, dtypes, devices, sizes or `impl`, or an implementation that cannot run here.
    """
    check_attention(query, key, value, impl, IMPLEMENTATIONS)
    _check_proxies(query, proxy_key=proxy_key, proxy_value=proxy_value)
    count = cells_in_focus(num_tokens, proxy_key.shape[2], grid)
    if query.shape[2] != math.prod(grid) or side < 1 or count < 1:
        raise ValueError(
            f"grid must hold the {query.shape[2]} tokens of query, side be positive and num_tokens enough for one of "
            f"the {proxy_key.shape[2]} cells, got {grid=}, {side=}, {num_tokens=}"
        )
    impl = choose_impl(query, side, impl)
    tensors = (query, key, value, proxy_key, proxy_value)
    return focus_op(*tensors, grid, count, side, scale, impl, *to_arguments(window))[:2]


def _check_proxies(query: Tensor, **proxies: Tensor) -> None:
    batch, num_heads, _, head_dim = query.shape
    num_cells = proxies["proxy_key"].shape[2] if proxies["proxy_key"].ndim == 4 else 0
    for name, tensor in proxies.items():
        if num_cells == 0 or tensor.shape != (batch, num_heads, num_cells, head_dim):
            raise ValueError(f"{name} must be [B, H, C, D] like query, C > 0, got {tuple(tensor.shape)}")
    check_devices(query, **proxies)


INPUTS = "Tensor query, Tensor key, Tensor value, Tensor proxy_key, Tensor proxy_value"
CELLS = "SymInt[] grid, SymInt count, SymInt side, float scale, str impl"
WINDOW = "float? radius, SymInt? frame_radius, SymInt[]? box"
SHAPES = f"{CELLS}, {WINDOW}"


@torch.library.custom_op(
    "lineardit::focus_attention",
    mutates_args=(),
    **CACHES_TABLES,
    schema=f"({INPUTS}, {SHAPES}) -> (Tensor, Tensor, Tensor)",
)
def focus_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proxy_key: Tensor,
    proxy_value: Tensor,
    grid: Sequence[int],
    count: int,
    side: int,
    scale: float,
    impl: str,
    radius: float | None,
    frame_radius: int | None,
    box: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """far [B, H, n, D], lse [B, H, n], and the cells that the tiles chose [B, H, G, k]; an operator because tables
    depend on the grid: tracing would recompile for each grid.
    """
    inputs = (query, key, value, proxy_key, proxy_value)
    if query.numel() == 0:  # an empty batch: PyTorch's own kernels would divide by zero
        return _outputs(*inputs, grid, count, side)
    window = from_arguments(radius, frame_radius, box)
    out = token_major(query, query.shape[2])
    with torch.autocast(query.device.type, enabled=False):
        if impl == "triton" and division_is_exact(tuple(grid), proxy_key.shape[2], count):
            from .triton_focus import triton_forward

            blocks = blocks_for(query.device, query.dtype, query.shape[3], side)
            lse, chosen = triton_forward(inputs, out, tuple(grid), window, count, side, scale, blocks)
        else:
            lse, chosen = plain_forward(inputs, out, tuple(grid), window, count, side, scale)
        return out, lse, chosen.int()


@focus_op.register_fake
def _outputs(query, key, value, proxy_key, proxy_value, grid, count, side, *_):  # type: ignore[no-untyped-def]
    """Uninitialized results of `focus_op`."""
    frames, height, width = sizes_of(grid)
    tiles = frames * ((height + side - 1) // side) * ((width + side - 1) // side)
    return (
        token_major(query, query.shape[2]),
        query.new_empty(query.shape[:3], dtype=sum_dtype(query)),
        query.new_empty(*query.shape[:2], tiles, count, dtype=torch.int32),
    )


@torch.library.custom_op(
    "lineardit::focus_attention_backward",
    mutates_args=(),
    **CACHES_TABLES,
    schema=f"(Tensor grad_out, Tensor? grad_lse, {INPUTS}, Tensor out, Tensor lse, Tensor chosen, {SHAPES}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def focus_backward_op(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proxy_key: Tensor,
    proxy_value: Tensor,
    out: Tensor,
    lse: Tensor,
    chosen: Tensor,
    grid: Sequence[int],
    count: int,
    side: int,
    scale: float,
    impl: str,
    radius: float | None,
    frame_radius: int | None,
    box: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the inputs; `out`, `lse` and `chosen` as returned by `focus_op`."""
    inputs = (query, key, value, proxy_key, proxy_value)
    if query.numel() == 0:
        return _gradients(grad_out, grad_lse, *inputs)
    window = from_arguments(radius, frame_radius, box)
    with torch.autocast(query.device.type, enabled=False):
        arguments = (grad_out, grad_lse, inputs, out, lse, chosen.long(), tuple(grid), window, side, scale)
        blocks = None
        if impl == "triton" and division_is_exact(tuple(grid), proxy_key.shape[2], count):
            blocks = backward_blocks(query.device, query.dtype, query.shape[3], side)
        if blocks is not None:
            from .triton_focus import triton_backward

            return triton_backward(*arguments, blocks)
        return plain_backward(*arguments)


@focus_backward_op.register_fake
def _gradients(grad_out, grad_lse, query, key, value, proxy_key, proxy_value, *_):  # type: ignore[no-untyped-def]
    return tuple(one.new_empty(one.shape) for one in (query, key, value, proxy_key, proxy_value))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.shapes = inputs[:5], inputs[5:]
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    *tensors, out, lse, chosen = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = focus_backward_op(grad_out, grad_lse, *tensors, out, lse, chosen, *ctx.shapes)
    return (*grads, *(None,) * 8)


focus_op.register_autograd(_backward, setup_context=_setup_context)
