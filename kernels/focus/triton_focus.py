"""Focus by the Triton kernel: the choice of cells, tables on the device, the launch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..pieces.launch import block_d, dense_rows, device_of, with_strides
from ..window.windows import Window
from . import triton_kernels as kernels
from .cells import Grid, sizes_of
from .chosen_cells import choose
from .rest_of_cells import log_rest
from .tables import Plan, plan_of

# What one chunk of the choice may hold in queries and logits.
CHOICE_BYTES = 2**28


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Keys that a program takes at once; its warps; stages of its loads."""

    keys: int
    num_warps: int
    num_stages: int


# float32 sums that fit the registers of a program.
MAX_SUMS = 2**14


def queries_of_a_program(side: int) -> int:
    """Slots for a tile of side * side queries: a power of two, at least 16 for the matrix units."""
    return max(16, triton.next_power_of_2(side * side))


def fits(side: int, head_dim: int) -> bool:
    """Whether one program can hold a tile."""
    return queries_of_a_program(side) * block_d(head_dim) <= MAX_SUMS


def candidates(side: int) -> list[Blocks]:
    """For tiles of side * side queries, the largest first."""
    num_warps = 4 if queries_of_a_program(side) < 64 else 8  # with 4, 64 queries spill 0.9 KB a thread
    return [
        Blocks(keys=keys, num_warps=num_warps, num_stages=num_stages)
        for keys, num_stages in ((64, 3), (64, 2), (32, 2), (32, 1), (16, 1))
    ]


@dataclass(frozen=True, kw_only=True)
class Tables:
    """A plan (tables.py) as the kernel reads it."""

    tiles: Tensor  # [G, BLOCK_Q] int32 tokens, -1 where there is none
    cells: Tensor  # [C, L] int32
    distances: tuple[Tensor, ...]  # of rows, columns, frames, int32


@lru_cache(maxsize=4)
def _tables(grid: Grid, window: Window, num_cells: int, side: int, device: torch.device) -> Tables:
    plan = plan_of(grid, window, num_cells, side, torch.float32, device)
    tiles = plan.tiles.masked_fill(~plan.real, -1)
    frames, rows, columns = plan.distances
    return Tables(
        tiles=F.pad(tiles, (0, queries_of_a_program(side) - tiles.shape[1]), value=-1).int().contiguous(),
        cells=plan.cells.int().contiguous(),
        distances=(rows.contiguous(), columns.contiguous(), frames.contiguous()),
    )


def triton_forward(
    inputs: Sequence[Tensor],
    out: Tensor,
    grid: Grid,
    window: Window,
    count: int,
    side: int,
    scale: float,
    blocks: Blocks,
) -> tuple[Tensor, Tensor]:
    """Fill `out` [B, H, n, D], whose rows are dense.

    Args:
        inputs: query, key, value [B, H, n, D], proxy_key, proxy_value [B, H, C, D].
        count: k, of the cells that a tile chooses.
    Returns:
        The log-sum-exp [B, H, n], float32, and the chosen cells [B, H, G, k].
    """
    query = inputs[0]
    dense = [dense_rows(one.to(query.dtype)) for one in inputs]
    batch, num_heads, num_tokens, head_dim = query.shape
    num_cells = inputs[3].shape[2]
    plan = plan_of(grid, window, num_cells, side, torch.float32, query.device)
    tables = _tables(grid, window, num_cells, side, query.device)
    chosen, clear = _choose(query, inputs[3], plan, count, scale)
    num_tiles = len(plan.tiles)
    hidden = torch.zeros(batch, num_heads, num_tiles, num_cells, dtype=torch.int8, device=query.device)
    hidden.scatter_(3, chosen, 1)
    lse = out.new_empty(batch, num_heads, num_tokens, dtype=torch.float32)
    with device_of(out):
        kernels.focus_forward[(num_tiles * batch * num_heads,)](
            *with_strides(*dense, out),
            lse,
            *(tables.tiles, tables.cells, plan.shares, log_rest(query, grid, window, num_cells)),
            *(chosen.int(), hidden, clear, *tables.distances),
            *(num_heads, batch * num_heads, num_tiles, num_tokens, num_cells, plan.cells.shape[1], count, plan.limit),
            *sizes_of(grid),
            scale,
            BLOCK_Q=tables.tiles.shape[1],
            BLOCK_K=blocks.keys,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d(head_dim),
            PRECISION="ieee",
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
    return lse, chosen


def _choose(query: Tensor, proxy_key: Tensor, plan: Plan, count: int, scale: float) -> tuple[Tensor, Tensor]:
    """The chosen cells [B, H, G, k], first those that no window of the tile reaches, and how many these are."""
    batch, num_heads, num_cells, head_dim = proxy_key.shape
    of_a_tile = 4 * batch * num_heads * (plan.tiles.shape[1] * head_dim + num_cells)
    step = max(1, CHOICE_BYTES // of_a_tile)
    proxy_key = proxy_key.float()
    choices = []
    for start in range(0, len(plan.tiles), step):
        tiles = slice(start, start + step)
        choices.append(choose(query[:, :, plan.tiles[tiles]].float(), proxy_key, plan, tiles, count, scale))
    chosen = torch.cat(choices, 2)
    reached = plan.reached[torch.arange(len(plan.tiles), device=chosen.device)[:, None], chosen]
    chosen = chosen.gather(3, reached.int().argsort(dim=3, stable=True))
    return chosen, (count - reached.sum(3)).int()
