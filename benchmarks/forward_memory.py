"""What a forward of FLUX.1 holds beside its weights: `python benchmarks/forward_memory.py`, seconds on a CPU.

In FLUX.1-dev's shape, without numbers (meta device), as `high.plan` counts it; for docs/high_resolution.md.
"""

import json
from pathlib import Path

import torch

from lineardit.pipelines.estimate import CHUNK_TOKENS, GIB, Shape, forward, peak_in_chunks

CONFIG = Path(__file__).parents[1] / "tests/data/flux1-dev/transformer/config.json"
SIDES = (1024, 4096, 8192)  # pixels
PIXELS_PER_LATENT = 8
TEXT_LEN = 512


def peak_bytes(side: int, chunk_tokens: int | None) -> tuple[int, int]:
    """Of a square picture in bfloat16; and bytes of one copy of all tokens at the model's width."""
    text, latents = CONFIG.read_text(), (side // PIXELS_PER_LATENT,) * 2
    shape = Shape(
        model_class="FluxTransformer2DModel", config=text, dtype=torch.bfloat16, latents=latents, text_len=TEXT_LEN
    )
    step, config = forward(shape), json.loads(text)
    if step is None:
        raise ValueError(f"{CONFIG} has no positions for {side} pixels")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    peak = step.peak if chunk_tokens is None else peak_in_chunks(shape, chunk_tokens)
    return peak, (step.grid[0] * step.grid[1] + TEXT_LEN) * width * torch.bfloat16.itemsize


def main() -> None:
    print(f"| | at once | in chunks of {CHUNK_TOKENS} |\n| --- | --- | --- |")
    for side in SIDES:
        cells = []
        for chunk_tokens in (None, CHUNK_TOKENS):
            peak, copy = peak_bytes(side, chunk_tokens)
            cells.append(f"{peak / copy:.1f} copies, {peak / GIB:.1f} GiB")
        print(f"| {side} x {side} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
