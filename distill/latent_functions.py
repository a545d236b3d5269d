"""What training on final latents needs to know about a model class: one row of six short functions.

Models without a row are trained on calls of their own denoiser (`calls.py`), which need none of this.

B batch, N image tokens, C channels of a packed token (a 2x2 patch of latents for FLUX).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image
from torch import Tensor

from ..pipelines.fresh_noise import draw_noise_from
from ..pipelines.latents import unpack_latents
from ..pipelines.vae import decode

Conditions = dict[str, Tensor]  # the model's conditioning inputs, each [B, ...]
Grid = tuple[int, int]  # rows and columns of image tokens


@dataclass(frozen=True, kw_only=True)
class LatentFunctions:
    """Functions for the pipelines of one model class."""

    grid: Callable[[Any, int, int], Grid]  # (pipe, height, width in pixels)
    encode: Callable[[Any, list[str], int], Conditions]  # (pipe, prompts, text tokens)
    generate: Callable[..., Tensor]  # (pipe, conditions, *, height, width, steps, guidance, generators) -> [B, N, C]
    decode: Callable[[Any, Tensor, Grid], list[Image.Image]]  # (pipe, [B, N, C], grid)
    shift: Callable[[Any, Tensor, Grid], Tensor]  # (scheduler, sigma, grid) -> sigma
    inputs: Callable[..., dict[str, Any]]  # (model, noisy, sigma, conditions, *, grid, guidance) -> forward arguments


def _flux_grid(pipe: Any, height: int, width: int) -> Grid:
    stride = 2 * pipe.vae_scale_factor
    if height % stride or width % stride:
        raise ValueError(f"height and width must be multiples of {stride} for this model, got {height}x{width}")
    return height // stride, width // stride


def _flux_encode(pipe: Any, prompts: list[str], max_sequence_length: int) -> Conditions:
    embeds, pooled, _ = pipe.encode_prompt(prompt=prompts, prompt_2=None, max_sequence_length=max_sequence_length)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _flux_generate(
    pipe: Any,
    conditions: Conditions,
    *,
    height: int,
    width: int,
    steps: int,
    guidance: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    with draw_noise_from(pipe.scheduler, list(generators)):
        return pipe(
            prompt_embeds=conditions["prompt_embeds"],
            pooled_prompt_embeds=conditions["pooled_prompt_embeds"],
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=list(generators),
            output_type="latent",
        ).images


def _flux_decode(pipe: Any, latents: Tensor, grid: Grid) -> list[Image.Image]:
    planes = unpack_latents(latents, 2 * grid[0], 2 * grid[1]).to(pipe.vae.dtype)
    pixels = decode(pipe.vae, planes, tile=None)  # in tiles if memory runs out
    pipe.maybe_free_model_hooks()  # an offloaded VAE leaves the GPU before the next picture
    return pipe.image_processor.postprocess(pixels, output_type="pil")


def _flux_shift(scheduler: Any, sigma: Tensor, grid: Grid) -> Tensor:
    config = scheduler.config
    if not config.use_dynamic_shifting:
        return scheduler.shift * sigma / (1 + (scheduler.shift - 1) * sigma)
    shift_arguments = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
    return scheduler.time_shift(calculate_shift(grid[0] * grid[1], *shift_arguments), 1.0, sigma)


def _flux_inputs(
    model: Any, noisy: Tensor, sigma: Tensor, conditions: Conditions, *, grid: Grid, guidance: float
) -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    image_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    text_len = conditions["prompt_embeds"].shape[1]
    return {
        "hidden_states": noisy,
        # rounded as the pipeline rounds it
        "timestep": (1000 * sigma).to(noisy.dtype) / 1000,
        "guidance": torch.full_like(sigma, guidance) if model.config.guidance_embeds else None,
        "encoder_hidden_states": conditions["prompt_embeds"],
        "pooled_projections": conditions["pooled_prompt_embeds"],
        "img_ids": image_ids.to(noisy.device, torch.float32),
        "txt_ids": torch.zeros(text_len, 3, device=noisy.device),
        "return_dict": False,
    }


LATENT_FUNCTIONS = {
    "FluxTransformer2DModel": LatentFunctions(
        grid=_flux_grid,
        encode=_flux_encode,
        generate=_flux_generate,
        decode=_flux_decode,
        shift=_flux_shift,
        inputs=_flux_inputs,
    )
}


def has_latent_functions(model: torch.nn.Module) -> bool:
    """Whether this model's class can be trained on final latents."""
    return type(model).__name__ in LATENT_FUNCTIONS


def latent_functions(model: torch.nn.Module) -> LatentFunctions:
    """The row of a model's class.

    Raises:
        ValueError: there is none.
    """
    if not has_latent_functions(model):
        raise ValueError(
            f"final latents are supported for {', '.join(LATENT_FUNCTIONS)}, got a {type(model).__name__}: record its "
            "calls, as `lineardit prepare` does without --calls 0"
        )
    return LATENT_FUNCTIONS[type(model).__name__]
