"""How far the VAE's results in tiles are from those in one piece: `python benchmarks/vae_tiles.py`, a minute.

Prints mean differences on the small model's VAE, with group norm statistics of each tile and of the whole image.
"""

from contextlib import nullcontext
from unittest.mock import patch

import torch
from diffusers.image_processor import VaeImageProcessor

from lineardit.examples.tiny_flux import path, scenes
from lineardit.linearize.adapters.opening import open_pipeline
from lineardit.pipelines.vae import decode, encode

CASES = ((3, (768, 768), 256), (11, (768, 512), 128), (20, (512, 768), 96))  # scene, (height, width), tile


def main() -> None:
    vae = open_pipeline(path()).vae
    per_tile_statistics = patch("lineardit.pipelines.vae.whole_statistics", lambda *_: nullcontext())
    print("| scene, size, tile | decoded, each its own | whole's | VAE's error | encoded, each its own | whole's |")
    print("| --- | --- | --- | --- | --- | --- |")
    for number, (height, width), tile in CASES:
        pixels = VaeImageProcessor().preprocess(scenes.draw(scenes.sample(number), (width, height)))
        latents = encode(vae, pixels, tile=None)
        picture = decode(vae, latents, tile=None)
        errors: dict[str, list[torch.Tensor]] = {"decoded": [], "encoded": []}
        for statistics in (per_tile_statistics, nullcontext()):
            with statistics:
                errors["decoded"].append(decode(vae, latents, tile=tile) - picture)
                errors["encoded"].append(encode(vae, pixels, tile=tile) - latents)
        figures = [*errors["decoded"], picture - pixels, *errors["encoded"]]
        cells = " | ".join(f"{figure.abs().mean():.3f}" for figure in figures)
        print(f"| {number}, {width} x {height}, {tile} | {cells} |")


if __name__ == "__main__":
    main()
