"""Choice of the cells that a tile's queries see token by token: those that their mean weighs most (attention.py)."""

import torch
from torch import Tensor

from .tables import FocusTables


def choose(query: Tensor, proxy_key: Tensor, tables: FocusTables, tiles: slice, count: int, scale: float) -> Tensor:
    """Cells [B, H, tiles, k].

    Args:
        query: [B, H, tiles, Q, D], the queries of `tiles`; their mean and the logits are in the dtype of `tables`.
        proxy_key: [B, H, C, D].
        count: k.
    """
    real = tables.real[tiles][:, :, None]
    log_rest = tables.log_rest_of_tiles.at(torch.arange(len(tables.tiles), device=real.device)[tiles])
    mean = (query * real).sum(3, dtype=log_rest.dtype) / real.sum(1)
    logits = scale * mean @ proxy_key.to(mean.dtype).mT + log_rest
    return logits.topk(count, dim=-1).indices
