"""Memory of a forward of FLUX.1 besides its weights: `python benchmarks/forward_memory.py`, a minute on a CPU.

In FLUX.1-dev's shape, on the meta device, as `high.plan` counts it; and the tables that the hybrid of `lineardit
convert` caches between calls, as on a GPU. For docs/high_resolution.md.
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils._pytree import tree_leaves

from lineardit import Hybrid
from lineardit.kernels.focus.tables import focus_tables
from lineardit.linearize.measures.peak_bytes import peak_with
from lineardit.linearize.methods import RECOMMENDED
from lineardit.pipelines.estimate import CHUNK_TOKENS, GIB, Shape, forward, step_in_chunks

CONFIG = Path(__file__).parents[1] / "tests/data/flux1-dev/transformer/config.json"
SIDES = (1024, 4096, 8192)  # pixels
PIXELS_PER_LATENT = 8
TEXT_LEN = 512


def peak_bytes(side: int, chunk_tokens: int | None, methods: tuple[Any, ...] = ()) -> tuple[int, int]:
    """Peak of a square picture in bfloat16 with these methods, and bytes of all tokens at the model's width."""
    text, latents = CONFIG.read_text(), (side // PIXELS_PER_LATENT,) * 2
    shape = Shape(
        model_class="FluxTransformer2DModel", config=text, dtype=torch.bfloat16, latents=latents, text_len=TEXT_LEN
    )
    step, config = forward(shape), json.loads(text)
    if step is None:
        raise ValueError(f"{CONFIG} has no positions for {side} pixels")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    counted = step if chunk_tokens is None else step_in_chunks(shape, chunk_tokens)
    num_tokens = step.grid[0] * step.grid[1] + TEXT_LEN
    return peak_with(counted, methods, torch.bfloat16), num_tokens * width * torch.bfloat16.itemsize


def table_bytes(side: int) -> int:
    """Bytes of the tables that the recommended hybrid caches for a square picture."""
    hybrid, tokens = cast(Hybrid, RECOMMENDED), side // PIXELS_PER_LATENT // 2
    grid, window, device = (tokens, tokens), hybrid.local.shape, torch.device("cpu")
    tables = focus_tables(
        grid, window, hybrid.num_cells, hybrid.focus_side, torch.float32, device, rest_dtype=torch.bfloat16
    )
    return sum(leaf.nbytes for leaf in tree_leaves(tables) if isinstance(leaf, torch.Tensor))


def main() -> None:
    columns = [(None, ()), (None, (RECOMMENDED,)), (CHUNK_TOKENS, ()), (CHUNK_TOKENS, (RECOMMENDED,))]
    chunks = f"in chunks of {CHUNK_TOKENS}"
    print(f"| | at once | hybrid | {chunks} | hybrid, {chunks} | tables of the hybrid |\n|{' --- |' * 6}")
    for side in SIDES:
        cells = []
        for chunk_tokens, methods in columns:
            peak, copy = peak_bytes(side, chunk_tokens, methods)
            cells.append(f"{peak / copy:.1f} copies, {peak / GIB:.1f} GiB")
        print(f"| {side} x {side} | {' | '.join(cells)} | {table_bytes(side) / 2**20:.1f} MiB |")


if __name__ == "__main__":
    main()
