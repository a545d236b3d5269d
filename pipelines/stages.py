"""Runs the stages of a cascade one after the other: prepares the model for each, and the transition to the next.

B pictures; latents are [B, C, h, w], or [B, N, C] where the model takes FLUX's tokens.
"""

import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ..linearize.calling import BINNING, for_batch
from ..linearize.convert import dense
from ..linearize.networks import denoiser
from ..linearize.seam.conversion import conversion_of
from ..linearize.seam.logits import scaled_logits
from .fresh_noise import draw_noise_from
from .kernel_log import log_kernels
from .latents import unpack_latents
from .low_frequencies import FollowCallback
from .pictures import enlarged, resized
from .plan import Plan, Stage
from .positions import exact_positions, positions_stretched, rope_scaled
from .sizes import size_multiple
from .stage_schedule import noised, scheduler_of
from .stock import from_pipeline_latents, to_pipeline_latents
from .text_encoding import encode_text_once
from .token_chunks import in_token_chunks
from .vae import decode, encode_faithfully, latent_channels, pixels_per_latent

logger = logging.getLogger(__name__)

# Slow options of the text encoding, which runs once: FLUX.2's prompts, rewritten by a language model.
_TEXT_OPTIONS = ("caption_upsample_temperature",)

OnStage = Callable[[Any, int, dict[str, Any]], None]


@dataclass(frozen=True)
class Start:
    """Where a cascade begins: with stage `stage`, from pictures to enlarge or from the previous stage's latents."""

    stage: int = 0
    pictures: list[Image.Image] | None = None
    latents: Tensor | None = None


class StagedPipeline(DiffusionPipeline):
    """Runs the stages of a plan.

    Attributes:
        stock: diffusers' text-to-image pipeline, whose call makes each stage.
        stage, stage_number: The stage being denoised, and its index in the plan, for callbacks after steps; else None.
    """

    stock: Any
    scheduler: Any
    stage: Stage | None = None
    stage_number: int | None = None

    def _cascade(
        self,
        plan: Plan,
        start: Start,
        call: Mapping[str, Any],
        generators: list[Any],
        batch: int,
        on_step_end: Any,
        on_stage_end: OnStage | None,
    ) -> tuple[Tensor, Stage]:
        """The latents of the last stage that ran, and that stage; `call` goes to the stock pipeline."""
        pictures, latents = start.pictures, start.latents
        self._interrupt = False
        with encode_text_once(self) as begin_call:
            for number in range(start.stage, len(plan.stages)):
                stage = plan.stages[number]
                if number > 0:
                    assert latents is not None
                    pictures = self._pictures(latents, plan.stages[number - 1], plan.tile)
                    if on_stage_end is not None:
                        on_stage_end(self, number - 1, {"images": pictures})
                        if self._interrupt:
                            _warn_interrupted(plan, number - 1)
                            return latents, plan.stages[number - 1]
                clean = None
                if pictures is not None and not stage.is_stock:
                    clean = self._enlarged(pictures, stage, plan.tile, batch)
                begin_call()
                with self._log_stage(number, plan), self._stage_setup(stage):
                    latents = self._denoise(stage, clean, call, generators[number], batch, on_step_end)
                call = {name: value for name, value in call.items() if name not in _TEXT_OPTIONS}
                if on_stage_end is not None:
                    on_stage_end(self, number, {"latents": latents})
                if self._interrupt:
                    _warn_interrupted(plan, number)
                    break
        assert latents is not None
        return latents, stage

    def _stage_arguments(self, prompt: Any, call: Mapping[str, Any], on_step_end: Any) -> dict[str, Any]:
        """Arguments of the stock pipeline in each stage, from those of the cascade's call."""
        call = dict(for_batch(call, len(prompt)) if isinstance(prompt, list) else call)  # one negative prompt for all
        inputs = getattr(on_step_end, "tensor_inputs", None)  # of diffusers' own callbacks
        inputs = call.get("callback_on_step_end_tensor_inputs") if inputs is None else inputs
        if inputs is not None:
            call["callback_on_step_end_tensor_inputs"] = list({"latents", *inputs})
        if BINNING in inspect.signature(self.stock.__call__).parameters:
            call[BINNING] = False
        return call | {"prompt": prompt}

    def _denoise(
        self, stage: Stage, clean: Tensor | None, call: Mapping[str, Any], generator: Any, batch: int, on_step_end: Any
    ) -> Tensor:
        """Run one stage with the stock pipeline, from clean latents [B, C, h, w]; None: from noise alone."""
        call = {
            **call,
            "height": stage.height,
            "width": stage.width,
            "num_inference_steps": stage.steps,
            "generator": generator,
            "output_type": "latent",
        }
        if "control_image" in call:
            call["control_image"] = resized(call["control_image"], stage.height, stage.width)
        if stage.is_stock:
            return self._stock_call(call, on_step_end)
        original = self.scheduler
        scheduler = scheduler_of(stage, original, self._execution_device)
        scale, dtype = pixels_per_latent(self.vae), denoiser(self)[1].dtype
        shape = (batch, latent_channels(self.vae), stage.height // scale, stage.width // scale)
        latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=dtype)
        if clean is not None:
            latents = noised(scheduler, clean, latents.float()).to(latents.dtype)
            if stage.follow:
                on_step_end = FollowCallback(clean, latents, follow=stage.follow, callback=on_step_end)
        self.scheduler = scheduler
        try:
            return self._stock_call(call | {"latents": to_pipeline_latents(self, latents)}, on_step_end)
        finally:
            self.scheduler = original

    def _stock_call(self, call: Mapping[str, Any], on_step_end: Any) -> Tensor:
        if on_step_end is not None:
            call = {**call, "callback_on_step_end": on_step_end}
        with draw_noise_from(self.scheduler, call["generator"]):
            latents = from_pipeline_latents(self, self.stock.__call__(self, **call).images)
        scale = pixels_per_latent(self.vae)
        num_positions = call["height"] * call["width"] // scale**2
        if latents[0].numel() != num_positions * latent_channels(self.vae):
            raise RuntimeError(
                f"{self.stock.__name__} was asked for {call['width']}x{call['height']} pixels and made latents "
                f"{list(latents.shape)}, of another size"
            )
        return latents

    @contextmanager
    def _stage_setup(self, stage: Stage) -> Iterator[None]:
        """Inside, the model and its ControlNet are set up for this stage."""
        _, model = denoiser(self)
        converted = conversion_of(model) is not None
        original = dense(self) if converted and stage.attention == "original" else nullcontext()
        logits = scaled_logits(self, stage.logit_factor) if stage.logit_factor != 1 else nullcontext()
        chunks = nullcontext() if stage.chunk_tokens is None else in_token_chunks(model, stage.chunk_tokens)
        side = max(stage.height, stage.width) // size_multiple(self)
        stretched = positions_stretched(model, side, self._execution_device)
        with original, logits, exact_positions(self), rope_scaled(self, stage.rope_factor), stretched, chunks:
            yield

    @contextmanager
    def _log_stage(self, number: int, plan: Plan) -> Iterator[None]:
        """Show the progress of one stage's steps, and log how long it took."""
        stage = plan.stages[number]
        progress_config = dict(getattr(self, "_progress_bar_config", {}))
        label = f"stage {number + 1} of {len(plan.stages)}, {stage.width}x{stage.height}, {stage.attention} attention"
        self.set_progress_bar_config(**{"unit": "step", **progress_config, "desc": label})
        self.stage, self.stage_number = stage, number
        began = time.perf_counter()
        kernels = log_kernels(self, label) if stage.attention == "converted" else nullcontext()
        try:
            with kernels:
                yield
        finally:
            self.stage = self.stage_number = None
            self.set_progress_bar_config(**progress_config)
        logger.info("%s: %.1f s", label, time.perf_counter() - began)

    def _pictures(self, latents: Tensor, stage: Stage, tile: int | None) -> list[Image.Image]:
        return self.image_processor.postprocess(self._decoded(latents, stage, tile), output_type="pil")

    def _decoded(self, latents: Tensor, stage: Stage, tile: int | None) -> Tensor:
        """Latents -> [B, 3, height, width] in [-1, 1]."""
        scale = pixels_per_latent(self.vae)
        if latents.ndim == 3:
            latents = unpack_latents(latents, stage.height // scale, stage.width // scale)
        # latents of a resumed cascade come from a file, or from a callback that keeps them elsewhere
        return decode(self.vae, latents.to(self._execution_device), tile=tile, progress=self._shows_progress())

    def _enlarged(self, pictures: list[Image.Image], stage: Stage, tile: int | None, batch: int) -> Tensor:
        """Clean latents [B, C, h, w] of pictures at the stage's size, each repeated to fill the batch."""
        size = {"height": stage.height, "width": stage.width}
        large = [enlarged(picture, **size, sharpen=stage.sharpen) for picture in pictures]
        pixels = self.image_processor.preprocess(large, **size)
        options: dict[str, Any] = {"tile": tile, "progress": self._shows_progress()}
        latents = encode_faithfully(self.vae, pixels.to(self._execution_device), **options)
        return latents.to(self._execution_device).repeat_interleave(batch // len(latents), 0)

    @torch.no_grad()
    def decode_last(self, latents: Tensor, plan: Plan) -> list[Image.Image]:
        """The pictures of a plan's last stage from its latents, as a callback received them."""
        pictures, _ = self._finish(latents, plan.stages[-1], plan, "pil")
        self.maybe_free_model_hooks()
        return pictures

    def _finish(self, latents: Tensor, stage: Stage, plan: Plan, output_type: str) -> tuple[Any, list[bool] | None]:
        """The pictures, at the requested size or smaller if interrupted, and which are unsafe (None: not checked)."""
        pixels = self._decoded(latents, stage, plan.tile)[..., : plan.height, : plan.width]
        if getattr(self, "watermark", None) is not None:  # SDXL's, where it is installed
            pixels = self.watermark.apply_watermark(pixels)
        unsafe = None
        if getattr(self, "safety_checker", None) is not None:
            pixels, unsafe = self.run_safety_checker(pixels, self._execution_device, self.vae.dtype)
        safe = [not one for one in unsafe or [False] * len(pixels)]  # unsafe pictures are 0 already, which is black
        return self.image_processor.postprocess(pixels, output_type=output_type, do_denormalize=safe), unsafe

    def _shows_progress(self) -> bool:
        return not getattr(self, "_progress_bar_config", {}).get("disable", False)


def stage_generators(generator: Any, count: int) -> list[Any]:
    """One generator, or list of them, for each stage: the user's for the first, new ones for the others.

    Their seeds come from a copy of the user's, so that a cascade resumed at a later stage draws the same noise, and the
    first stage matches the stock pipeline.
    """
    if generator is None:
        return [None] * count
    if isinstance(generator, list):
        return [list(one) for one in zip(*(stage_generators(one, count) for one in generator), strict=True)]
    seeds = torch.randint(2**62, (count,), generator=generator.clone_state(), device=generator.device).tolist()
    return [generator, *(torch.Generator(generator.device).manual_seed(seed) for seed in seeds[1:])]


def _warn_interrupted(plan: Plan, number: int) -> None:
    """Warn that a callback has set diffusers' `_interrupt`: the pictures are those of that stage."""
    stage = plan.stages[number]
    size = f"{stage.width}x{stage.height}"
    logger.warning("interrupted in stage %d of %d: the result has %s pixels", number + 1, len(plan.stages), size)
