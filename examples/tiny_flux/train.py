"""Trains the tiny FLUX pipeline on drawn scenes: `python -m lineardit.examples.tiny_flux.train --vae DIRECTORY RUN`.

    x_t = (1 - t) x_0 + t noise,   loss = |transformer(x_t, t, caption) - (noise - x_0)|^2

Flow matching (arXiv:2210.02747) with FLUX's resolution-dependent shift of t. Transformer and both text encoders are
trained together. Pictures come in mixed sizes and aspect ratios, small ones first. The run resumes from its last
checkpoint; the moving average of the weights is what is exported.
"""

import argparse
import csv
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from . import scenes
from .model import build_pipeline
from .train_vae import pictures

PIXELS_PER_TOKEN = 4  # a side: the autoencoder halves, packing halves again
TOKENS_PER_STEP = 4096  # of images
# (width, height): share of the steps, in the first, second and third phase of the training
SIZES = {
    (64, 64): (0.70, 0.10, 0.08),
    (96, 64): (0.10, 0.05, 0.03),
    (64, 96): (0.10, 0.05, 0.03),
    (128, 128): (0.10, 0.60, 0.66),
    (160, 96): (0.00, 0.10, 0.05),
    (96, 160): (0.00, 0.10, 0.05),
    (192, 192): (0.00, 0.00, 0.05),
    (256, 256): (0.00, 0.00, 0.05),
}
PHASES = (0.35, 0.8, 1.0)  # where each one ends, as a share of all steps
EVALUATED = 16  # held-out captions


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int
    learning_rate: float = 1.5e-3
    warmup: int = 200
    ema_decay: float = 0.999
    seed: int = 0
    save_every: int = 250
    evaluate_every: int = 1000


def size_of_step(step: int, settings: Settings) -> tuple[int, int]:
    """The (width, height) of one step's pictures: a function of the step, so that a resumed run goes on alike."""
    phase = next(i for i, end in enumerate(PHASES) if step < end * settings.steps)
    rng = random.Random(f"size-{settings.seed}-{step}")
    return rng.choices(list(SIZES), [shares[phase] for shares in SIZES.values()])[0]


def text_len_of_step(step: int, num_tokens: int, settings: Settings) -> int:
    """Mostly short texts; long ones, which pad much, beside few large pictures."""
    rng = random.Random(f"text-{settings.seed}-{step}")
    return rng.choices((32, 64, 128, 512), (0.5, 0.4, 0.05, 0.05) if num_tokens >= 1024 else (0.7, 0.3, 0, 0))[0]


class TinyFlux(nn.Module):
    """What is trained: the transformer and both text encoders."""

    def __init__(self, pipe: FluxPipeline):
        super().__init__()
        self.transformer, self.clip, self.t5 = pipe.transformer, pipe.text_encoder, pipe.text_encoder_2

    def forward(self, noisy: Tensor, times: Tensor, ids: tuple[Tensor, Tensor], height: int, width: int) -> Tensor:
        """noisy: [B, 4, H, W] latents, times: [B] in [0, 1], ids: CLIP's and T5's token ids [B, L] -> [B, 4, H, W]."""
        clip_ids, t5_ids = ids
        rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        img_ids = torch.stack([torch.zeros_like(rows), rows, cols], -1).reshape(-1, 3).float()
        out = self.transformer(
            hidden_states=pack(noisy),
            timestep=times,
            encoder_hidden_states=self.t5(t5_ids)[0],
            pooled_projections=self.clip(clip_ids).pooler_output,
            img_ids=img_ids,
            txt_ids=torch.zeros(t5_ids.shape[1], 3),
            return_dict=False,
        )[0]
        return unpack(out, height, width)


def pack(latents: Tensor) -> Tensor:
    """[B, C, 2h, 2w] -> [B, h * w, 4 C], FLUX's tokens."""
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, h * w, 4 C] -> [B, C, 2h, 2w]."""
    batch, _, channels = tokens.shape
    cells = tokens.reshape(batch, height, width, channels // 4, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, 2 * height, 2 * width)


@dataclass(frozen=True)
class Batch:
    latents: Tensor  # [B, 4, 2 height, 2 width], normalised
    ids: tuple[Tensor, Tensor]
    grid: tuple[int, int]


def make_batch(pipe: FluxPipeline, first: int, step: int, settings: Settings) -> Batch:
    """Scenes `first`, `first + 1`, ... drawn, encoded, and told with their objects in either order."""
    width, height = size_of_step(step, settings)
    grid = height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
    num_tokens = grid[0] * grid[1]
    count = TOKENS_PER_STEP // num_tokens
    with torch.no_grad():
        latents = pipe.vae.encode(pictures(first, count, width, height)).latent_dist.mode()
    latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    captions = [scenes.sample(i).say(reverse=i % 3 == 0) for i in range(first, first + count)]
    text_len = text_len_of_step(step, num_tokens, settings)
    return Batch(
        latents, (token_ids(pipe.tokenizer, captions, 77), token_ids(pipe.tokenizer_2, captions, text_len)), grid
    )


def token_ids(tokenizer: object, captions: list[str], length: int) -> Tensor:
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def shifted_times(count: int, num_tokens: int) -> Tensor:
    """Logit-normal times in (0, 1), shifted towards noise as FLUX's scheduler does for `num_tokens` image tokens."""
    mu = 0.5 + (1.15 - 0.5) * (num_tokens - 256) / (4096 - 256)
    return torch.sigmoid(torch.randn(count) + mu)


def flow_loss(model: TinyFlux, batch: Batch) -> Tensor:
    times = shifted_times(len(batch.latents), batch.grid[0] * batch.grid[1])
    noise = torch.randn_like(batch.latents)
    mix = times.view(-1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model((1 - mix) * batch.latents + mix * noise, times, batch.ids, *batch.grid)
    return (velocity.float() - (noise - batch.latents)).square().mean()


def optimizers(model: TinyFlux, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for all else."""
    inner = [p for n, p in model.named_parameters() if "block" in n and p.ndim == 2 and "relative_attention" not in n]
    chosen = {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            inner, lr=settings.learning_rate, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(outer, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, settings: Settings) -> float:
    """Warm-up, constant, then linear to zero over the last quarter; `steps` may change while the rate is constant."""
    return min(1.0, (step + 1) / settings.warmup, 4 * (1 - step / settings.steps) + 0.01)


class Run:
    """A training that can be stopped at any time and goes on from its last checkpoint."""

    def __init__(self, folder: Path, pipe: FluxPipeline, settings: Settings):
        self.folder, self.pipe, self.settings = folder, pipe, settings
        self.model = TinyFlux(pipe).train()
        self.optimizers = optimizers(self.model, settings)
        self.ema = EMAModel(self.model.parameters(), decay=settings.ema_decay)
        self.step = self.seen = 0
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "checkpoint.pt").exists():
            self.load()

    def load(self) -> None:
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seen = state["step"], state["seen"]

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seen": self.seen,
        }
        torch.save(state, self.folder / "checkpoint.tmp")
        os.replace(self.folder / "checkpoint.tmp", self.folder / "checkpoint.pt")

    def train(self) -> None:
        start, first = time.monotonic(), self.step
        with (self.folder / "loss.csv").open("a", newline="") as file:
            log = csv.writer(file)
            for loss in self.losses():
                log.writerow((self.step, f"{loss:.5f}", f"{time.time():.0f}"))
                if self.step % 50 == 0:
                    file.flush()
                    speed = (time.monotonic() - start) / (self.step - first)
                    left = speed * (self.settings.steps - self.step) / 60
                    print(f"step {self.step}  loss {loss:.4f}  {speed:.2f} s/step  {left:.0f} min left", flush=True)
                if self.step % self.settings.save_every == 0 or self.step == self.settings.steps:
                    self.save()
                if self.step % self.settings.evaluate_every == 0:
                    print(f"step {self.step}  {self.evaluate()}", flush=True)

    def losses(self) -> Iterator[float]:
        """One optimizer step each; yields a running mean of the loss."""
        mean = None
        while self.step < self.settings.steps:
            torch.manual_seed(self.settings.seed * 1_000_003 + self.step)
            batch = make_batch(self.pipe, self.seen, self.step, self.settings)
            loss = flow_loss(self.model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.settings.learning_rate * rate(self.step, self.settings)
                optimizer.step()
                optimizer.zero_grad()
            self.ema.step(self.model.parameters())
            self.step += 1
            self.seen += len(batch.latents)
            value = loss.item()
            mean = value if mean is None else 0.98 * mean + 0.02 * value
            yield mean

    @torch.no_grad()
    def evaluate(self) -> str:
        """Object score and coherence of the averaged weights on a few held-out captions, 12 steps."""
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        self.model.eval()
        self.pipe.set_progress_bar_config(disable=True)
        parts = []
        for size in (64, 128):
            right = total = coherent = 0
            with torch.autocast("cpu", torch.bfloat16):
                captions = [scenes.sample(i, split="held_out").caption for i in range(EVALUATED)]
                generators = [torch.Generator().manual_seed(i) for i in range(EVALUATED)]
                images = self.pipe(
                    captions,
                    height=size,
                    width=size,
                    num_inference_steps=12,
                    max_sequence_length=64,
                    generator=generators,
                ).images
            for caption, image in zip(captions, images, strict=True):
                hits, objects = scenes.score(caption, image)
                right, total, coherent = right + hits, total + objects, coherent + scenes.read(image).coherence
            parts.append(f"{size} px: {right}/{total} objects, {coherent}/{EVALUATED} coherent")
        self.ema.restore(self.model.parameters())
        self.model.train()
        return "; ".join(parts)


def export(run: Run, directory: Path) -> None:
    """Writes the pipeline with the averaged weights; the transformer in bfloat16, which halves its file."""
    run.ema.copy_to(run.model.parameters())
    run.model.eval()
    run.pipe.save_pretrained(directory)
    run.pipe.transformer.to(torch.bfloat16).save_pretrained(directory / "transformer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the checkpoint and the loss log")
    parser.add_argument("--vae", type=Path, required=True, help="autoencoder from train_vae")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--export", type=Path, help="write the pipeline here instead of training on")
    arguments = parser.parse_args()
    pipe = build_pipeline()
    pipe.register_modules(vae=AutoencoderKL.from_pretrained(arguments.vae).eval())
    run = Run(arguments.run, pipe, Settings(steps=arguments.steps))
    if arguments.export:
        export(run, arguments.export)
    else:
        run.train()


if __name__ == "__main__":
    main()
