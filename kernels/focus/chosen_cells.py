"""Which cells the queries of a tile see token by token: those that their mean weighs most (attention.py)."""

from torch import Tensor

from .tables import FocusTables


def choose(query: Tensor, proxy_key: Tensor, tables: FocusTables, tiles: slice, count: int, scale: float) -> Tensor:
    """Cells [B, H, tiles, k].

    Args:
        query: [B, H, tiles, Q, D], of the tiles of `tiles`; its mean is in the tables' dtype, as all that follows.
        proxy_key: [B, H, C, D].
        count: k.
    """
    real = tables.real[tiles][:, :, None]
    mean = (query * real).sum(3, dtype=tables.log_rest_of_tiles.dtype) / real.sum(1)
    logits = scale * mean @ proxy_key.to(mean.dtype).mT + tables.log_rest_of_tiles[tiles]
    return logits.topk(count, dim=-1).indices
