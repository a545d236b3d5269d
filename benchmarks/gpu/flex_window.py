"""FlexAttention with a circular window: tokens in any tile order, the BlockMask from the geometry of the tiles.

`create_block_mask` visits every pair of tokens: at 8K, 69 billion. Here only pairs of tiles are visited: two tiles
touch if the gap between their rows and columns is shorter than the radius, and a tile is seen whole if the farthest
corners are near enough. Row-major order, which CLEAR (arXiv:2412.16112) uses, is the tile order whose tiles are as wide
as the picture, or parts of one row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
BLOCK = 128  # FlexAttention's block size


@dataclass(frozen=True, kw_only=True)
class TileOrder:
    """Image tokens ordered by query tile, within it by key tile, within that row-major.

    Tiles are (rows, columns); key tiles divide query tiles, and query tiles the grid.
    """

    grid: tuple[int, int]
    query_tile: tuple[int, int]
    key_tile: tuple[int, int]

    def __post_init__(self) -> None:
        for large, small in ((self.grid, self.query_tile), (self.query_tile, self.key_tile)):
            if large[0] % small[0] or large[1] % small[1]:
                raise ValueError(f"{small} must divide {large}")

    @property
    def block_size(self) -> tuple[int, int]:
        """Tokens of a query tile and of a key tile."""
        return self.query_tile[0] * self.query_tile[1], self.key_tile[0] * self.key_tile[1]

    def row_and_column(self, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column of the token in a slot."""
        (rows, columns), (key_rows, key_columns) = self.query_tile, self.key_tile
        query_size, key_size = self.block_size
        tile, in_tile = slot // query_size, slot % query_size
        part, in_part = in_tile // key_size, in_tile % key_size
        tiles_across, parts_across = self.grid[1] // columns, columns // key_columns
        row = tile // tiles_across * rows + part // parts_across * key_rows + in_part // key_columns
        column = tile % tiles_across * columns + part % parts_across * key_columns + in_part % key_columns
        return row, column


def row_major(grid: tuple[int, int]) -> TileOrder:
    """Row-major order as a tile order of FlexAttention's blocks."""
    height, width = grid
    tile = (1, BLOCK) if width % BLOCK == 0 else (BLOCK // width, width)
    return TileOrder(grid=(height, width), query_tile=tile, key_tile=tile)


def tile_mask_mod(order: TileOrder, radius: int, text_len: int, *, text_queries: bool) -> MaskMod:
    """Text before the image among the keys, and among the queries if `text_queries`."""
    first_query = text_len if text_queries else 0

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_row, query_column = order.row_and_column(query - first_query)
        key_row, key_column = order.row_and_column(key - text_len)
        near = (query_row - key_row) ** 2 + (query_column - key_column) ** 2 < radius * radius
        return (query < first_query) | (key < text_len) | near

    return attends


def row_major_mask_mod(width: int, radius: int, text_len: int) -> MaskMod:
    """CLEAR's mask: rows and columns by integer division, for every pair."""

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_image, key_image = query - text_len, key - text_len
        rows = query_image // width - key_image // width
        columns = query_image % width - key_image % width
        return (query < text_len) | (key < text_len) | (rows * rows + columns * columns < radius * radius)

    return attends


def analytic_block_mask(
    order: TileOrder, radius: int, text_len: int, mask_mod: MaskMod, device: torch.device, *, text_queries: bool
) -> BlockMask:
    """Equal to `create_block_mask(mask_mod, ...)`; text_len in whole blocks."""
    query_size, key_size = order.block_size
    if text_len % query_size or text_len % key_size:
        raise ValueError(f"text_len must be a multiple of the blocks {order.block_size}, got {text_len}")
    touched, full = _image_blocks(order, radius, device)
    text_keys = touched.new_ones(len(touched), text_len // key_size)
    touched, full = (torch.cat([text_keys, blocks], dim=1) for blocks in (touched, full))
    if text_queries:
        text_rows = touched.new_ones(text_len // query_size, touched.shape[1])
        touched, full = (torch.cat([text_rows, blocks]) for blocks in (touched, full))
    return BlockMask.from_kv_blocks(
        *_ordered(touched & ~full),
        *_ordered(full),
        BLOCK_SIZE=order.block_size,
        mask_mod=mask_mod,
        seq_lengths=(touched.shape[0] * query_size, touched.shape[1] * key_size),
    )


def pairs_computed(mask: BlockMask) -> int:
    """Pairs of query and key in all blocks that are visited."""
    query_size, key_size = mask.BLOCK_SIZE
    assert mask.full_kv_num_blocks is not None
    blocks = mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()
    return int(blocks) * query_size * key_size


def _image_blocks(order: TileOrder, radius: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[query tiles, key tiles] bool each: some pair is near enough; all pairs are."""
    query_size, key_size = order.block_size
    num_tokens = order.grid[0] * order.grid[1]
    query_coordinates = order.row_and_column(torch.arange(0, num_tokens, query_size, device=device))
    key_coordinates = order.row_and_column(torch.arange(0, num_tokens, key_size, device=device))
    nearest = farthest = torch.zeros((), dtype=torch.int64, device=device)
    for axis in (0, 1):
        query_first, key_first = query_coordinates[axis][:, None], key_coordinates[axis]
        query_last = query_first + order.query_tile[axis] - 1
        key_last = key_first + order.key_tile[axis] - 1
        nearest = nearest + torch.maximum(key_first - query_last, query_first - key_last).clamp(min=0) ** 2
        farthest = farthest + torch.maximum(key_last - query_first, query_last - key_first) ** 2
    return nearest < radius * radius, farthest < radius * radius


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Number of blocks in every row, and the columns with these first: [1, 1, rows], [1, 1, rows, columns]."""
    columns = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1).int()[None, None], columns.int()[None, None].contiguous()
