"""Pairs that our Triton kernels compute: all pairs of the tiles that a window touches."""

from lineardit.kernels.window.lists import circle_lists
from lineardit.kernels.window.triton_probe import backward_tiles_for, forward_tiles_for
from lineardit.kernels.window.triton_window import Tiles

from .bench import Bench, Shape


def our_pairs(shape: Shape, bench: Bench, *, backward: bool) -> tuple[int, int, str]:
    """Pairs for each head in whole tiles, of the forward and of the backward pass; and the tiles in words."""
    forward_tiles = forward_tiles_for(bench.device, shape.dtype, shape.head_dim)
    pairs = _pairs(shape, forward_tiles)
    if not backward:
        return pairs, 0, f"{forward_tiles}"
    backward_tiles = backward_tiles_for(bench.device, shape.dtype, shape.head_dim)
    return pairs, _pairs(shape, backward_tiles), f"{forward_tiles}; backward {backward_tiles}"


def _pairs(shape: Shape, tiles: Tiles) -> int:
    lists = circle_lists((shape.side, shape.side), shape.radius, query_tile=tiles.owned, key_tile=tiles.read)
    window = lists.query_tokens.shape[1] * lists.key_tokens.shape[1] * int(lists.counts.sum())
    return window + shape.image_len * shape.text_len + shape.text_len * shape.num_tokens
