"""Trains the tiny FLUX pipeline on drawn scenes: `python -m lineardit.examples.tiny_flux.train RUN --vae DIRECTORY`.

First the T5 encoder alone learns which words belong together (train_text.py), and is then frozen; transformer and CLIP
encoder are trained together, on the loss of flow.py. A run resumes from its last checkpoint; the moving average of the
weights is exported. Under `torchrun --nproc_per_node N -m ...` every process draws its own pictures, and the gradients
are averaged.
"""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, FluxPipeline
from diffusers.training_utils import EMAModel

from lineardit.distill.figures import StepLog
from lineardit.distill.precision import bfloat16_is_faster

from . import scenes
from .flow import STRIDES, TinyFlux, TrainConfig, flow_loss, image_positions, make_batch, phase_of_step
from .model import build_pipeline
from .train_text import train_text_encoder

EVALUATED = 16  # held-out captions


def optimizers(model: TinyFlux, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for all else."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inner = [p for name, p in trained if "block" in name and p.ndim == 2]
    chosen = {id(p) for p in inner}
    outer = [p for _, p in trained if id(p) not in chosen]
    return [
        torch.optim.Muon(
            inner, lr=config.matrix_learning_rate, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(outer, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_factor(step: int, config: TrainConfig) -> float:
    """Warm-up, constant, then linear to zero over the last quarter; `steps` may change while the rate is constant."""
    return min(1.0, (step + 1) / config.warmup, 4 * (1 - step / config.steps) + 0.01)


class Run:
    """A training run that can be stopped at any time and resumes from its last checkpoint."""

    def __init__(self, folder: Path, pipe: FluxPipeline, config: TrainConfig):
        self.folder, self.pipe, self.config = folder, pipe.to(config.device), config
        self.model = TinyFlux(pipe).train()
        self.optimizers = optimizers(self.model, config)
        self.ema = EMAModel(self.model.parameters(), decay=config.ema_decay)
        self.step = self.seen = 0
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "checkpoint.pt").exists():
            self.load()

    def load(self) -> None:
        """Goes back to the last checkpoint."""
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True, map_location=self.config.device)
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seen = state["step"], state["seen"]

    def save(self) -> None:
        """Replaces the checkpoint atomically."""
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
        """Trains to the last step; writes loss.csv, loss.png and checkpoints on the way."""
        start, first = time.monotonic(), self.step
        if self.rank > 0:
            for _ in self.losses():
                pass
            return
        log = StepLog(self.folder / "loss.csv", ["loss"], last_step=self.step)
        for loss in self.losses():
            log.append({"step": self.step, "loss": round(loss, 5)})
            if self.step % 50 == 0:
                speed = (time.monotonic() - start) / (self.step - first)
                left = speed * (self.config.steps - self.step) / 60
                print(f"step {self.step}  loss {loss:.4f}  {speed:.2f} s/step  {left:.0f} min left", flush=True)
            if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                self.save()
                log.draw(self.folder / "loss.png")
            if self.step % self.config.evaluate_every == 0:
                print(f"step {self.step}  {self.evaluate()}", flush=True)

    def losses(self) -> Iterator[float]:
        """One optimizer step each; yields its loss."""
        while self.step < self.config.steps:
            torch.manual_seed((self.config.seed * 1_000_003 + self.step) * 1_009 + self.rank)
            batch = make_batch(self.pipe, self.seen, self.step, self.config, self.rank)
            loss = flow_loss(self.model, batch)
            loss.backward()
            self.average_gradients()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            peaks = self.config.matrix_learning_rate, self.config.learning_rate
            for optimizer, peak in zip(self.optimizers, peaks, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = peak * rate_factor(self.step, self.config)
                optimizer.step()
                optimizer.zero_grad()
            self.ema.step(self.model.parameters())
            self.step += 1
            self.seen += len(batch.latents) * self.world_size
            yield loss.item()

    def average_gradients(self) -> None:
        """Averages over all processes, in one call."""
        if self.world_size == 1:
            return
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads]) / self.world_size
        dist.all_reduce(flat)
        for grad, averaged in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(averaged.view_as(grad))

    @torch.no_grad()
    def evaluate(self) -> str:
        """Object score and coherence of the averaged weights on a few held-out captions, 12 steps."""
        stride = STRIDES[phase_of_step(self.step - 1, self.config)]
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        self.model.eval()
        self.pipe.set_progress_bar_config(disable=True)
        captions = [scenes.sample(i, split="held_out").caption for i in range(EVALUATED)]
        size = 128 // stride
        mixed = torch.autocast(self.config.device, torch.bfloat16, enabled=bfloat16_is_faster(self.config.device))
        with mixed, strided_positions(self.pipe, stride):
            images = self.pipe(
                captions,
                height=size,
                width=size,
                num_inference_steps=12,
                max_sequence_length=64,
                generator=[torch.Generator().manual_seed(i) for i in range(EVALUATED)],
            ).images
        scores = [scenes.score(caption, image) for caption, image in zip(captions, images, strict=True)]
        right, total = (sum(column) for column in zip(*scores, strict=True))
        coherent = sum(scenes.read(image).coherence for image in images)
        self.ema.restore(self.model.parameters())
        self.model.train()
        return f"{size} px: {right}/{total} objects, {coherent}/{EVALUATED} coherent"


@contextmanager
def strided_positions(pipe: FluxPipeline, stride: int) -> Iterator[None]:
    """Inside, the pipeline's image tokens have positions `stride` apart, as in the first phase of the training."""

    def strided(batch_size: int, height: int, width: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        return image_positions(height, width, stride).to(device, dtype)

    pipe._prepare_latent_image_ids = strided
    try:
        yield
    finally:
        del pipe._prepare_latent_image_ids


def join_processes(device: str) -> None:
    """Join the processes of `torchrun`, if it started this one; each uses the GPU of its local rank."""
    if "WORLD_SIZE" not in os.environ:
        return
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()


def export(run: Run, directory: Path) -> None:
    """Writes the pipeline with the averaged weights; transformer and autoencoder in 16 bits, to save space."""
    run.ema.copy_to(run.model.parameters())
    run.model.eval()
    run.pipe.save_pretrained(directory)
    run.pipe.transformer.to(torch.bfloat16).save_pretrained(directory / "transformer")
    run.pipe.vae.to(torch.float16).save_pretrained(directory / "vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the checkpoint and the loss log")
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument(
        "--vae", type=Path, help="autoencoder from train_vae; everything else starts from random weights"
    )
    start.add_argument(
        "--init", type=Path, help="a pipeline to continue from, with fresh optimizer state; its T5 encoder is kept"
    )
    parser.add_argument("--steps", type=int, default=4600)
    parser.add_argument("--learning-rate", type=float, default=1.0, help="factor on the learning rates of the settings")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--export", type=Path, help="write the pipeline here instead of training on")
    arguments = parser.parse_args()
    join_processes(arguments.device)  # before the first tensor on a device
    if arguments.init:
        pipe = FluxPipeline.from_pretrained(arguments.init)
    else:
        pipe = build_pipeline()
        pipe.register_modules(vae=AutoencoderKL.from_pretrained(arguments.vae).eval())
        if not (arguments.run / "checkpoint.pt").exists():
            accuracy = train_text_encoder(pipe, device=arguments.device)
            print(f"text encoder: {accuracy:.1%} of the words predict their object fully", flush=True)
    defaults = TrainConfig(steps=arguments.steps, device=arguments.device)
    config = replace(
        defaults,
        learning_rate=defaults.learning_rate * arguments.learning_rate,
        matrix_learning_rate=defaults.matrix_learning_rate * arguments.learning_rate,
    )
    run = Run(arguments.run, pipe, config)
    if arguments.export:
        export(run, arguments.export)
    else:
        run.train()


if __name__ == "__main__":
    main()
