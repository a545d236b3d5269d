"""Trains the tiny pipeline's autoencoder on drawn scenes: `python -m lineardit.examples.tiny_flux.train_vae DIRECTORY`.

loss = |decoded - picture| + (decoded - picture)^2 + KL_WEIGHT * KL(latent || normal)
"""

import argparse
import math
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from . import scenes
from .model import build_vae

KL_WEIGHT = 1e-3  # of the mean over the latent's entries
HELD_OUT_PICTURES = 64


def pictures(
    first: int, count: int, width: int, height: int, *, split: Literal["train", "held_out"] = "train"
) -> Tensor:
    """Scenes `first` to `first + count`, drawn: [count, 3, height, width] in [-1, 1]."""
    drawn = [scenes.render(scenes.sample(i, split=split), width, height) for i in range(first, first + count)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) * 2 - 1


@torch.no_grad()
def measure(vae: AutoencoderKL, size: int) -> tuple[float, float, float]:
    """PSNR in dB (mean over held-out pictures), and the latents' mean and standard deviation."""
    original = pictures(0, HELD_OUT_PICTURES, size, size, split="held_out")
    latents = vae.encode(original).latent_dist.mode()
    decoded = vae.decode(latents).sample.clamp(-1, 1)
    errors = ((decoded - original) / 2).square().mean((1, 2, 3))
    return float((-10 * errors.log10()).mean()), float(latents.mean()), float(latents.std())


def train(steps: int, batch: int, seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    vae = build_vae().train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.05)
    start = time.monotonic()
    for step in range(steps):
        width, height = [(64, 64), (64, 64), (96, 64), (64, 96)][step % 4]
        original = pictures(step * batch, batch, width, height)
        posterior = vae.encode(original).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        error = decoded - original
        loss = (
            error.abs().mean() + error.square().mean() + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            left = (time.monotonic() - start) / (step + 1) * (steps - step - 1)
            psnr = -10 * math.log10(float((error / 2).square().mean()))
            print(
                f"step {step}/{steps}  loss {loss.item():.4f}  PSNR {psnr:.1f} dB  {left / 60:.0f} min left", flush=True
            )
    return vae.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where the autoencoder is written")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    vae = train(arguments.steps, arguments.batch)
    _, mean, std = measure(vae, 128)
    vae.register_to_config(shift_factor=mean, scaling_factor=1 / std)
    vae.save_pretrained(arguments.directory)
    for size in (64, 128, 256):
        print(f"{size} px: PSNR {measure(vae, size)[0]:.1f} dB on held-out pictures")


if __name__ == "__main__":
    main()
