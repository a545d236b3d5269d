"""Training data and loss of the tiny pipeline: batches of drawn scenes in mixed sizes.

    x_t = (1 - t) x_0 + t noise,   loss = w |transformer(x_t, t, caption) - (noise - x_0)|^2

Flow matching (arXiv:2210.02747) with FLUX's resolution-dependent shift of t. Objects cover few of a picture's tokens
and all of its caption, so their weight w is larger at first; later it is 1, since w shifts the optimum.

B batch, H and W sides of the latents.
"""

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from lineardit.distill.precision import bfloat16_is_faster
from lineardit.pipelines.latents import pack_latents, unpack_latents

from . import scenes
from .train_vae import pictures

PIXELS_PER_TOKEN = 4  # a side: the autoencoder halves, packing halves again
TOKENS_PER_STEP = 4096  # of images, in each process
# (width, height): share of the steps in the first, second and third phase of the training. FLUX's positions count
# tokens, so the position of "right" depends on the size; it is learned far sooner at one size than at several. The
# first phase sees four times as many pictures, of 64 px: each token is at the middle of four tokens' place at 128 px.
SIZES = {
    (64, 64): (1.0, 0.0, 0.10),
    (128, 128): (0.0, 1.0, 0.60),
    (96, 64): (0.0, 0.0, 0.05),
    (64, 96): (0.0, 0.0, 0.05),
    (160, 96): (0.0, 0.0, 0.05),
    (96, 160): (0.0, 0.0, 0.05),
    (192, 192): (0.0, 0.0, 0.05),
    (256, 256): (0.0, 0.0, 0.05),
}
PHASES = (0.3, 0.9, 1.0)  # where each one ends, as a share of all steps
STRIDES = (2, 1, 1)  # of the positions, in each phase
# Extra shift of the times towards noise, in each phase. An object's colour and the side of its shadow, away from the
# sun, are decided while noise hides them; with a shift of 0.3 in the second phase, shadows fell at random.
EXTRA_SHIFTS = (1.2, 1.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int
    learning_rate: float = 8e-4  # of AdamW
    matrix_learning_rate: float = 1.6e-3  # of Muon
    object_weight: float = 4.0  # in the first two phases
    warmup: int = 200
    ema_decay: float = 0.997
    seed: int = 0
    save_every: int = 250
    evaluate_every: int = 1000
    device: str = "cpu"


def size_of_step(step: int, config: TrainConfig) -> tuple[int, int]:
    """The (width, height) of one step's pictures: a function of the step, so that a resumed run sees the same."""
    phase = phase_of_step(step, config)
    rng = random.Random(f"size-{config.seed}-{step}")
    return rng.choices(list(SIZES), [shares[phase] for shares in SIZES.values()])[0]


def phase_of_step(step: int, config: TrainConfig) -> int:
    """Index into PHASES."""
    return next(i for i, end in enumerate(PHASES) if step < end * config.steps)


def text_len_of_step(step: int, num_tokens: int, config: TrainConfig) -> int:
    """Text tokens of a step: mostly few; many, which are mostly padding, only with large pictures."""
    rng = random.Random(f"text-{config.seed}-{step}")
    return rng.choices((32, 64, 128, 512), (0.5, 0.4, 0.05, 0.05) if num_tokens >= 1024 else (0.8, 0.2, 0, 0))[0]


class TinyFlux(nn.Module):
    """The trained parts, transformer and CLIP encoder, and T5, which is frozen, as it is for the real FLUX.

    If trained as well, T5 forgets which words belong together.
    """

    def __init__(self, pipe: FluxPipeline):
        super().__init__()
        self.transformer, self.clip = pipe.transformer, pipe.text_encoder
        self.t5 = pipe.text_encoder_2.requires_grad_(False)

    def forward(self, noisy: Tensor, times: Tensor, ids: tuple[Tensor, Tensor], stride: int) -> Tensor:
        """noisy: [B, 4, H, W] latents, times: [B] in [0, 1], ids: CLIP's and T5's token ids [B, L] -> [B, 4, H, W]."""
        clip_ids, t5_ids = ids
        height, width = noisy.shape[-2] // 2, noisy.shape[-1] // 2
        img_ids = image_positions(height, width, stride).to(noisy)
        out = self.transformer(
            hidden_states=pack_latents(noisy),
            timestep=times,
            encoder_hidden_states=self.t5(t5_ids)[0],
            pooled_projections=self.clip(clip_ids).pooler_output,
            img_ids=img_ids,
            txt_ids=noisy.new_zeros(t5_ids.shape[1], 3),
            return_dict=False,
        )[0]
        return unpack_latents(out, *noisy.shape[-2:])


def image_positions(height: int, width: int, stride: int) -> Tensor:
    """[height * width, 3] as FLUX takes them: (0, row, column), each the middle of stride x stride positions."""
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, cols], -1).reshape(-1, 3) * stride + torch.tensor(
        [0, (stride - 1) / 2, (stride - 1) / 2]
    )


@dataclass(frozen=True)
class Batch:
    latents: Tensor  # [B, 4, 2 height, 2 width], normalised
    weight: Tensor  # [B, 1, 2 height, 2 width], mean 1
    ids: tuple[Tensor, Tensor]
    stride: int  # of the image tokens' positions
    extra_shift: float  # of the times


def make_batch(pipe: FluxPipeline, seen: int, step: int, config: TrainConfig, rank: int = 0) -> Batch:
    """The scenes after `seen`, drawn and encoded, with captions in either order; each rank takes the next ones."""
    width, height = size_of_step(step, config)
    num_tokens = (height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN)
    count = TOKENS_PER_STEP // num_tokens
    first = seen + rank * count
    with torch.no_grad():
        drawn = pictures(first, count, width, height).to(config.device)
        latents = pipe.vae.encode(drawn).latent_dist.mode()
    latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    phase = phase_of_step(step, config)
    weight = object_weights(first, count, width, height, config.object_weight if phase < 2 else 1)
    captions = [scenes.sample(i).say(reverse=i % 3 == 0) for i in range(first, first + count)]
    text_len = text_len_of_step(step, num_tokens, config)
    ids = token_ids(pipe.tokenizer, captions, 77), token_ids(pipe.tokenizer_2, captions, text_len)
    return Batch(
        latents,
        weight.to(latents),
        (ids[0].to(config.device), ids[1].to(config.device)),
        STRIDES[phase],
        EXTRA_SHIFTS[phase],
    )


def object_weights(first: int, count: int, width: int, height: int, weight: float) -> Tensor:
    """[count, 1, height / 2, width / 2], mean 1: `weight` times larger on objects, shadows and the sun."""
    masks = []
    for scene in (scenes.sample(i) for i in range(first, first + count)):
        empty = scenes.render(replace(scene, objects=()), width, height)
        elsewhere = scenes.render(replace(scene, objects=(), light=_opposite(scene.light)), width, height)
        drawn = np.abs(scenes.render(scene, width, height) - empty)
        masks.append(np.maximum(drawn, np.abs(elsewhere - empty)).max(-1))
    covered = max_pool2d(torch.from_numpy(np.stack(masks))[:, None], 2) > 0.02
    weights = 1 + (weight - 1) * covered.float()
    return weights / weights.mean()


def _opposite(light: str) -> str:
    """The corner across the picture."""
    return scenes.LIGHTS[len(scenes.LIGHTS) - 1 - scenes.LIGHTS.index(light)]


def token_ids(tokenizer: Any, captions: list[str], length: int) -> Tensor:
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def shifted_times(count: int, num_tokens: int, extra: float) -> Tensor:
    """Logit-normal times in (0, 1), shifted towards noise as FLUX's scheduler does for `num_tokens` image tokens."""
    mu = 0.5 + (1.15 - 0.5) * (num_tokens - 256) / (4096 - 256)
    return torch.sigmoid(torch.randn(count) + mu + extra)


def flow_loss(model: TinyFlux, batch: Batch) -> Tensor:
    times = shifted_times(len(batch.latents), batch.latents[0, 0].numel() // 4, batch.extra_shift).to(batch.latents)
    noise = torch.randn_like(batch.latents)
    mix = times.view(-1, 1, 1, 1)
    device = noise.device.type
    with torch.autocast(device, torch.bfloat16, enabled=bfloat16_is_faster(device)):
        velocity = model((1 - mix) * batch.latents + mix * noise, times, batch.ids, batch.stride)
    return ((velocity.float() - (noise - batch.latents)).square() * batch.weight).mean()
