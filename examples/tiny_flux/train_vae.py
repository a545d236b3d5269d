"""Trains the tiny pipeline's autoencoder on drawn scenes: `python -m lineardit.examples.tiny_flux.train_vae DIRECTORY`.

    loss = w |decoded - picture| + w (decoded - picture)^2 + KL_WEIGHT * KL(latent || normal)

First encoder and decoder, w = 1. Then, with `--refine DIRECTORY`, the decoder alone, so that latents and models trained
on them stay valid; w is larger on objects: they cover few pixels, and pale ones on a pale background fade.
"""

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from . import scenes
from .model import build_vae

KL_WEIGHT = 1e-3  # of the mean over the latent's entries
OBJECT_WEIGHT = 10.0  # w of objects and their shadows, relative to 1 elsewhere, while the decoder is refined
HELD_OUT_PICTURES = 64


def pictures(
    first: int, count: int, width: int, height: int, *, split: Literal["train", "held_out"] = "train"
) -> Tensor:
    """Scenes `first` to `first + count`, drawn: [count, 3, height, width] in [-1, 1]."""
    drawn = [scenes.render(scenes.sample(i, split=split), width, height) for i in range(first, first + count)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) * 2 - 1


def object_masks(first: int, count: int, width: int, height: int) -> Tensor:
    """Where objects and their shadows are: [count, 1, height, width], 1 or 0."""
    masks = []
    for scene in (scenes.sample(i) for i in range(first, first + count)):
        empty = scenes.render(replace(scene, objects=()), width, height)
        masks.append(np.abs(scenes.render(scene, width, height) - empty).max(-1) > 0.02)
    return torch.from_numpy(np.stack(masks))[:, None].float()


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
    progress = _Progress(steps)
    for step in range(steps):
        width, height = [(64, 64), (64, 64), (96, 64), (64, 96)][step % 4]
        original = pictures(step * batch, batch, width, height)
        posterior = vae.encode(original).latent_dist
        error = vae.decode(posterior.sample()).sample - original
        loss = (
            error.abs().mean() + error.square().mean() + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        )
        _update(vae, loss, optimizer, schedule)
        progress.log(step, loss, error)
    return vae.eval()


def refine(vae: AutoencoderKL, steps: int, batch: int, seed: int = 0) -> AutoencoderKL:
    """Train the decoder alone, on larger pictures, with weight on objects."""
    torch.manual_seed(seed)
    vae.train().encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps, pct_start=0.1)
    progress = _Progress(steps)
    for step in range(steps):
        sizes = [(128, 128), (64, 64), (96, 96), (128, 96)][step % 4]
        original = pictures(step * batch, batch, *sizes)
        weight = 1 + (OBJECT_WEIGHT - 1) * object_masks(step * batch, batch, *sizes)
        with torch.no_grad():
            latents = vae.encode(original).latent_dist.sample()
        error = vae.decode(latents).sample - original
        loss = (weight / weight.mean() * (error.abs() + error.square())).mean()
        _update(vae, loss, optimizer, schedule)
        progress.log(step, loss, error)
    return vae.requires_grad_(True).eval()


def _update(vae: AutoencoderKL, loss: Tensor, optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    schedule.step()


class _Progress:
    """A line every 50 steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.start = time.monotonic()

    def log(self, step: int, loss: Tensor, error: Tensor) -> None:
        if step % 50 and step < self.steps - 1:
            return
        left = (time.monotonic() - self.start) / (step + 1) * (self.steps - step - 1)
        psnr = -10 * math.log10(float((error.detach() / 2).square().mean()))
        print(
            f"step {step}/{self.steps}  loss {loss.item():.4f}  PSNR {psnr:.1f} dB  {left / 60:.0f} min left",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where the autoencoder is written")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--refine", type=Path, metavar="VAE", help="a trained autoencoder, to train its decoder further"
    )
    arguments = parser.parse_args()
    if arguments.refine:
        vae = refine(AutoencoderKL.from_pretrained(arguments.refine).float(), arguments.steps, arguments.batch)
    else:
        vae = train(arguments.steps, arguments.batch)
        _, mean, std = measure(vae, 128)
        vae.register_to_config(shift_factor=mean, scaling_factor=1 / std)
    vae.save_pretrained(arguments.directory)
    for size in (64, 128, 256):
        print(f"{size} px: PSNR {measure(vae, size)[0]:.1f} dB on held-out pictures")


if __name__ == "__main__":
    main()
