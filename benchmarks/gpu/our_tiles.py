"""What our kernels compute beyond the pairs that attend: the rest of the tiles that a window touches."""

from lineardit.kernels.window.lists import circle_lists

from .bench import Shape

# Query and key tiles of the Triton kernels on a card with at least 160 KiB of shared memory
QUERY_TILE = (8, 16)
KEY_TILE = (8, 8)


def our_pairs(shape: Shape, impl: str) -> int | None:
    """Pairs for each head, in whole tiles; None for an implementation without such tiles."""
    if impl != "triton":
        return None
    visited = []
    for query_tile in (QUERY_TILE, QUERY_TILE[::-1]):
        lists = circle_lists((shape.side, shape.side), shape.radius, query_tile=query_tile, key_tile=KEY_TILE)
        visited.append(int(lists.counts.sum()))
    tile_pairs = QUERY_TILE[0] * QUERY_TILE[1] * KEY_TILE[0] * KEY_TILE[1]
    return min(visited) * tile_pairs + shape.image_len * shape.text_len + shape.text_len * shape.num_tokens
