"""What our Triton kernels compute beyond the pairs that attend: the rest of the tiles that a window touches."""

from lineardit.kernels.window.lists import circle_lists
from lineardit.kernels.window.triton_probe import tiles_for

from .bench import Bench, Shape


def our_pairs(shape: Shape, bench: Bench) -> tuple[int, str]:
    """Pairs for each head, in whole tiles; and those tiles in words."""
    tiles = tiles_for(bench.device, shape.dtype, shape.head_dim)
    grid = (shape.side, shape.side)
    lists = circle_lists(grid, shape.radius, query_tile=tiles.query, key_tile=tiles.key)
    window = lists.query_tokens.shape[1] * lists.key_tokens.shape[1] * int(lists.counts.sum())
    text = shape.image_len * shape.text_len + shape.text_len * shape.num_tokens
    return window + text, f"{tiles}"
