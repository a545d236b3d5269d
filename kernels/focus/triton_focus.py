"""Focus by the Triton kernels: the choice of cells, tables on the device, the launches, forward and backward."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..pieces.cells import Grid, sizes_of
from ..pieces.launch import block_d, dense_rows, device_of, max_stages, split, with_strides
from ..pieces.table_cache import cached_table
from ..window.windows import Window
from . import triton_kernels as kernels
from .choose import EXACT_BELOW
from .chosen_cells import choose
from .tables import FocusTables, focus_tables

# Queries and float32 logits of one chunk of the choice of cells, each of which is in memory about twice.
CHOICE_BYTES = 2**27


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Keys that a program reads per step, its warps, and the stages of its loads."""

    keys: int
    num_warps: int
    num_stages: int


# float32 accumulators that fit a program's registers: of one tile of queries, or of the two gradients of a block of
# keys; fewer for float32 inputs (`max_stages` says why).
MAX_SUMS, MAX_FLOAT_SUMS = 2**14, 2**12
# Queries that a program of key gradients reads per step; with 64, 3.2 KB per thread spill on 8.0.
BLOCK_ROWS = 32


def query_slots(side: int) -> int:
    """Slots for a tile of side * side queries: a power of two, at least 16 for the matrix units."""
    return max(16, triton.next_power_of_2(side * side))


def fits(side: int, head_dim: int) -> bool:
    """Whether one program can hold a tile."""
    return query_slots(side) * block_d(head_dim) <= MAX_SUMS


def query_warps(side: int) -> int:
    """Warps of a program that owns a tile: with 4 for 64 queries, the forward spills 0.9 KB per thread."""
    return 4 if query_slots(side) < 64 else 8


def key_warps(keys: int) -> int:
    """Warps of a program that owns this many keys, and their two gradients."""
    return 8 if keys == 64 else 4


def candidates(side: int, dtype: torch.dtype) -> list[Blocks]:
    """Blocks to try for tiles of side * side queries, the largest first."""
    return [
        Blocks(keys=keys, num_warps=query_warps(side), num_stages=num_stages)
        for keys, num_stages in ((64, 3), (64, 2), (32, 2), (32, 1), (16, 1))
        if num_stages <= max_stages(dtype)
    ]


def backward_candidates(head_dim: int, dtype: torch.dtype) -> list[Blocks]:
    """Blocks to try for the backward's key programs, which hold two accumulators each; the largest first.

    Its query programs have the warps of `query_warps`.
    """
    max_sums = MAX_FLOAT_SUMS if dtype == torch.float32 else MAX_SUMS
    max_keys = max(16, max_sums // (2 * block_d(head_dim)))
    return [
        Blocks(keys=keys, num_warps=key_warps(keys), num_stages=num_stages)
        for keys, num_stages in ((64, 2), (64, 1), (32, 2), (32, 1), (16, 1))
        if keys <= max_keys and num_stages <= max_stages(dtype)
    ]


@dataclass(frozen=True, kw_only=True)
class PackedTables:
    """The tables of `FocusTables` (tables.py) that the kernels read in another form."""

    tiles: Tensor  # [G, BLOCK_Q] int32 tokens, -1 where there is none
    cells: Tensor  # [C, L] int32
    distances: tuple[Tensor, ...]  # of rows, columns, frames, int32


@cached_table(maxsize=8)
def _packed(
    grid: Grid, window: Window, num_cells: int, side: int, device: torch.device, rest_dtype: torch.dtype
) -> PackedTables:
    tables = focus_tables(grid, window, num_cells, side, torch.float32, device, rest_dtype)
    tiles = tables.tiles.masked_fill(~tables.real, -1)
    frames, rows, columns = tables.distances
    return PackedTables(
        tiles=F.pad(tiles, (0, query_slots(side) - tiles.shape[1]), value=-1).int().contiguous(),
        cells=tables.cells.int().contiguous(),
        distances=(rows.contiguous(), columns.contiguous(), frames.contiguous()),
    )


@dataclass(frozen=True, kw_only=True)
class _Call:
    """Inputs and tables of all kernels of one call."""

    inputs: list[Tensor]  # query, key, value, proxy_key, proxy_value: of one dtype, rows dense
    tables: FocusTables
    packed: PackedTables
    chosen: Tensor  # [B, H, G, k], first those that no window of the tile reaches
    num_unmasked: Tensor  # [B, H, G] int32, the number of these
    sizes: tuple[int, int, int]
    scale: float

    @property
    def lists(self) -> tuple[Tensor, ...]:
        """Arguments TILES to FRAMES of the kernels that own tiles of queries."""
        packed = self.packed
        cell_tables = packed.cells, self.tables.shares, self.log_rest
        return packed.tiles, *cell_tables, self.chosen.int(), self.hidden, self.num_unmasked, *packed.distances

    @cached_property
    def log_rest(self) -> Tensor:
        """[n, C], built once per call."""
        return self.tables.log_rest.everywhere()

    @cached_property
    def hidden(self) -> Tensor:
        """[B, H, G, C] int8, 1 for the chosen cells."""
        hidden = torch.zeros(*self.chosen.shape[:3], self.num_cells, dtype=torch.int8, device=self.chosen.device)
        return hidden.scatter_(3, self.chosen, 1)

    @property
    def num_cells(self) -> int:
        return self.inputs[3].shape[2]

    @property
    def counts(self) -> tuple[int, ...]:
        """Arguments num_tiles to per_width of the kernels that read cells."""
        num_tiles, count = self.chosen.shape[2:]
        _, cell_len = self.packed.cells.shape
        num_tokens = self.inputs[0].shape[2]
        _, height, width = self.sizes
        inverses = [-(-EXACT_BELOW // size) for size in (cell_len, height, width)]
        return num_tiles, num_tokens, self.num_cells, cell_len, count, self.tables.limit, *self.sizes, *inverses

    def constants(self, blocks: Blocks) -> dict[str, Any]:
        head_dim = self.inputs[0].shape[3]
        return {
            "BLOCK_Q": self.packed.tiles.shape[1],
            "BLOCK_K": blocks.keys,
            "HEAD_DIM": head_dim,
            "BLOCK_D": block_d(head_dim),
            "PRECISION": "ieee",
            "num_warps": blocks.num_warps,
            "num_stages": blocks.num_stages,
        }


def _prepare(
    inputs: Sequence[Tensor], grid: Grid, window: Window, side: int, scale: float, choice: int | Tensor
) -> _Call:
    """`choice`: the chosen cells, or how many of them to choose."""
    query, num_cells = inputs[0], inputs[3].shape[2]
    tables = focus_tables(grid, window, num_cells, side, torch.float32, query.device, query.dtype)
    chosen = choice if isinstance(choice, Tensor) else _choose(query, inputs[3], tables, choice, scale)
    reached = tables.reached_of(chosen, slice(None))
    return _Call(
        inputs=[dense_rows(one.to(query.dtype)) for one in inputs],
        tables=tables,
        packed=_packed(grid, window, num_cells, side, query.device, query.dtype),
        chosen=chosen.gather(3, reached.int().argsort(dim=3, stable=True)),
        num_unmasked=(~reached).sum(3, dtype=torch.int32),
        sizes=sizes_of(grid),
        scale=scale,
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
        count: k, the number of cells that a tile chooses.
    Returns:
        The log-sum-exp [B, H, n], float32, and the chosen cells [B, H, G, k].
    """
    call = _prepare(inputs, grid, window, side, scale, count)
    batch, num_heads, num_tokens, _ = out.shape
    lse = out.new_empty(batch, num_heads, num_tokens, dtype=torch.float32)
    strided, unit = with_strides(*call.inputs, out)
    with device_of(out):
        kernels.focus_forward[(call.chosen.shape[2] * batch * num_heads,)](
            *strided,
            lse,
            *call.lists,
            *(num_heads, batch * num_heads, *call.counts),
            scale,
            UNIT=unit,
            **call.constants(blocks),
        )
    return lse, call.chosen


def triton_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    inputs: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    chosen: Tensor,
    grid: Grid,
    window: Window,
    side: int,
    scale: float,
    blocks: Blocks,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the inputs; `out`, `lse` and `chosen` are those of `triton_forward`."""
    call = _prepare(inputs, grid, window, side, scale, chosen)
    query = call.inputs[0]
    grad_out = dense_rows(grad_out)
    batch, num_heads, *_ = query.shape
    grad_query = query.new_empty(query.shape)
    delta = torch.empty_like(lse)  # written by the query kernel, read by the key kernels
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.to(lse.dtype).contiguous()
    strided, unit = with_strides(grad_out, *call.inputs, out, grad_query)
    with device_of(query):
        kernels.focus_grad_query[(chosen.shape[2] * batch * num_heads,)](
            *strided,
            *(lse, grad_lse, delta),
            *call.lists,
            *(num_heads, batch * num_heads, *call.counts),
            scale,
            UNIT=unit,
            **call.constants(replace(blocks, num_warps=query_warps(side))),
        )
        key_grads = _cell_gradients(grad_out, lse, delta, call, blocks)
        proxy_grads = _proxy_gradients(grad_out, lse, delta, call, blocks)
    dk, dv, dpk, dpv = (grad.to(one.dtype) for grad, one in zip((*key_grads, *proxy_grads), inputs[1:], strict=True))
    return grad_query, dk, dv, dpk, dpv


def _cell_gradients(grad_out: Tensor, lse: Tensor, delta: Tensor, call: _Call, blocks: Blocks) -> list[Tensor]:
    """Gradients of key and value: of each cell over the tiles that chose it, then summed where cells overlap."""
    query, key, value = call.inputs[:3]
    batch, num_heads, _, count = call.chosen.shape
    cell_len = call.packed.cells.shape[1]
    keys = min(blocks.keys, max(16, triton.next_power_of_2(cell_len)))
    blocks = replace(blocks, keys=keys, num_warps=key_warps(keys))
    choosers = call.chosen.int().flatten(2).argsort(dim=2, stable=True) // count
    first = F.pad(call.hidden.sum(2, dtype=torch.int32).cumsum(2, dtype=torch.int32), (1, 0))
    places = call.tables.places
    disjoint = places.shape[1] == 1
    size = (batch, num_heads, places.shape[0] if disjoint else call.packed.cells.numel(), query.shape[3])
    grads = [query.new_empty(size, dtype=query.dtype if disjoint else torch.float32) for _ in range(2)]
    strided, unit = with_strides(grad_out, query, key, value)
    kernels.focus_grad_cell[call.num_cells, batch * num_heads, triton.cdiv(cell_len, keys)](
        *strided,
        *(*grads, lse, delta),
        *(call.packed.tiles, call.packed.cells, call.tables.shares),
        *(choosers.int(), first, *call.packed.distances),
        *(num_heads, *call.counts),
        call.scale,
        UNIT=unit,
        BLOCK_ROWS=BLOCK_ROWS,
        DISJOINT=disjoint,
        **call.constants(blocks),
    )
    return grads if disjoint else [_sum_over_cells(grad, places) for grad in grads]


def _sum_over_cells(cell_grads: Tensor, places: Tensor) -> Tensor:
    """[B, H, C * L, D] -> [B, H, n, D], each token's sum over the cells that hold it, in their order."""
    first, *more_places = places.unbind(1)
    token_grads = cell_grads.index_select(2, first)
    for place in more_places:
        token_grads += cell_grads.index_select(2, place.clamp(min=0)).where((place >= 0)[:, None], 0)
    return token_grads


def _proxy_gradients(grad_out: Tensor, lse: Tensor, delta: Tensor, call: _Call, blocks: Blocks) -> list[Tensor]:
    """Gradients of proxy_key and proxy_value, float32: partial sums over parts of the queries, then their sum."""
    query, _, _, proxy_key, proxy_value = call.inputs
    batch, num_heads, num_cells, head_dim = proxy_key.shape
    num_blocks = triton.cdiv(num_cells, blocks.keys)
    splits, split_len = split(call.packed.tiles.numel(), BLOCK_ROWS, num_blocks * batch * num_heads, query.device)
    partial = query.new_empty(2, splits, batch, num_heads, num_cells, head_dim, dtype=torch.float32)
    strided, unit = with_strides(grad_out, query, proxy_key, proxy_value)
    kernels.focus_grad_proxy[num_blocks, batch * num_heads, splits](
        *strided,
        *(*partial, lse, delta),
        *(call.packed.tiles, call.log_rest, call.hidden),
        *(num_heads, call.chosen.shape[2], query.shape[2], num_cells, split_len),
        call.scale,
        UNIT=unit,
        BLOCK_ROWS=BLOCK_ROWS,
        **call.constants(blocks),
    )
    return [grad.sum(0) for grad in partial]


def _choose(query: Tensor, proxy_key: Tensor, tables: FocusTables, count: int, scale: float) -> Tensor:
    """The chosen cells [B, H, G, k]."""
    batch, num_heads, num_cells, head_dim = proxy_key.shape
    bytes_per_tile = batch * num_heads * (query.element_size() * tables.tiles.shape[1] * head_dim + 4 * num_cells)
    step = max(1, CHOICE_BYTES // bytes_per_tile)
    choices = []
    for start in range(0, len(tables.tiles), step):
        tiles = slice(start, start + step)
        choices.append(choose(query[:, :, tables.tiles[tiles]], proxy_key, tables, tiles, count, scale))
    return torch.cat(choices, 2)
