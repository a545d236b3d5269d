"""FLUX.1 at high resolution: what a call takes, what a plan must know of the model, and how one stage runs.

B pictures, N image tokens, C numbers of a token.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .estimate import Estimator
from .high_resolution import HighResolutionPipeline, OnStage, Start, stage_generators
from .latents import pack_latents, unpack_latents
from .low_frequencies import LowFrequencies, noise_levels
from .pictures import as_pictures
from .plan import Limits, Plan, Settings, Stage
from .planning import cascade
from .vae import pixels_per_latent

logger = logging.getLogger(__name__)

OnStep = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


class FluxHighResolutionPipeline(HighResolutionPipeline, FluxImg2ImgPipeline):
    """FLUX.1 at sizes beyond its own; `FluxImg2ImgPipeline` denoises every stage."""

    scheduler: Any

    def plan(
        self,
        height: int | None = None,
        width: int | None = None,
        *,
        num_inference_steps: int = 28,
        settings: Settings | None = None,
        enlarge: bool | tuple[int, int] = False,
        tile: int | None = 1024,
        text_len: int = 512,
        batch: int = 1,
    ) -> Plan:
        """What a call at this size will do: print it, change it, give it to the call.

        Args:
            height, width: In pixels; None: the native size. What the model cannot make is rounded up and cropped.
            num_inference_steps: Of the first stage.
            settings: Of the later stages.
            enlarge: For a picture that is there, of native size or of this (height, width): no stage makes it anew.
            tile: Side in pixels of the VAE's tiles; None: in one piece.
            text_len, batch: Tokens and pictures, for the estimates of time and memory.
        Raises:
            ValueError: a setting is out of range.
        """
        native = self.native_size
        limits = Limits(
            native=native,
            multiple=2 * pixels_per_latent(self.vae),
            largest_shift=_largest_shift(self.scheduler),
            rope_dim=self.transformer.config.axes_dims_rope[-1],
            attention=self._attention(),
        )
        plan = cascade(
            native if height is None else height,
            native if width is None else width,
            limits,
            settings or Settings(),
            first_steps=num_inference_steps,
            enlarge=enlarge,
            text_len=text_len,
            tile=tile,
        )
        return Estimator(self).with_costs(self._with_advice(plan, limits.multiple), limits.multiple, text_len, batch)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        image: Any = None,
        plan: Plan | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        true_cfg_scale: float = 1.0,
        num_inference_steps: int = 28,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: OnStep | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback_on_stage_end: OnStage | None = None,
        max_sequence_length: int = 512,
        start_latents: Tensor | None = None,
        start_stage: int = 0,
    ) -> Any:
        """Make pictures; what is not named here is as in diffusers' `FluxPipeline`.

        Args:
            height, width: In pixels, any; None: the plan's, else the native size.
            image: Pictures to enlarge, in place of the first stage (`as_pictures`), as many as come out or fewer: each
                serves as many of them.
            plan: From `plan()`, perhaps changed; None: the default for this size.
            callback_on_step_end: Called after each step of each stage, as in diffusers; steps count within a stage.
            callback_on_stage_end: Called as callback(pipe, stage, {"latents": [B, N, C]}) once a stage is denoised, and
                as callback(pipe, stage, {"images": [PIL]}) once it is decoded, `start_latents` as well; the last
                stage's pictures are returned.
            start_latents, start_stage: Go on after stage `start_stage` - 1, with the latents the callback got of it,
                and with a generator as it was before the whole call: seeded anew.
        Returns:
            `FluxPipelineOutput`; with output_type="latent" the last stage's packed latents [B, N, C], uncropped.
        Raises:
            ValueError: the arguments do not fit together, or are those that diffusers refuses.
        """
        pictures = None if image is None else as_pictures(image)
        if plan is None:
            plan = self.plan(
                height,
                width,
                num_inference_steps=num_inference_steps,
                enlarge=False if pictures is None else (pictures[0].height, pictures[0].width),
                text_len=max_sequence_length,
            )
        elif (height or plan.height, width or plan.width) != (plan.height, plan.width):
            raise ValueError(f"height and width must be the plan's, {plan.height} and {plan.width}, or left out")
        self._check(plan, pictures, start_latents, start_stage)
        logger.info("%s", plan)
        negative = true_cfg_scale > 1 and (negative_prompt is not None or negative_prompt_embeds is not None)
        encode = {
            "num_images_per_prompt": num_images_per_prompt,
            "max_sequence_length": max_sequence_length,
            "lora_scale": (joint_attention_kwargs or {}).get("scale"),
        }
        self.check_inputs(
            prompt,
            prompt_2,
            1.0,
            plan.stages[-1].height,
            plan.stages[-1].width,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            callback_on_step_end_tensor_inputs=list(callback_on_step_end_tensor_inputs),
            max_sequence_length=max_sequence_length,
        )
        call = self._encoded("", prompt, prompt_2, prompt_embeds, pooled_prompt_embeds, encode)
        if negative:
            if isinstance(prompt, list):  # one for all
                negative_prompt, negative_prompt_2 = (
                    [text] * len(prompt) if isinstance(text, str) else text
                    for text in (negative_prompt, negative_prompt_2)
                )
            texts = (negative_prompt, negative_prompt_2, negative_prompt_embeds, negative_pooled_prompt_embeds)
            call |= self._encoded("negative_", *texts, encode)
        call |= {
            "true_cfg_scale": true_cfg_scale,
            "guidance_scale": guidance_scale,
            "ip_adapter_image": ip_adapter_image,
            "ip_adapter_image_embeds": ip_adapter_image_embeds,
            "joint_attention_kwargs": joint_attention_kwargs,
            "callback_on_step_end_tensor_inputs": list({"latents", *callback_on_step_end_tensor_inputs}),
        }
        self._check_numbers(plan, call["prompt_embeds"].shape[0], pictures, generator, start_latents, start_stage)
        start = Start(start_stage, pictures, start_latents)
        generators = stage_generators(generator, len(plan.stages))
        latents, stage = self._cascade(plan, start, call, generators, callback_on_step_end, callback_on_stage_end)
        self.maybe_free_model_hooks()  # the transformer leaves the card before the VAE comes
        images = latents if output_type == "latent" else self._finish(latents, stage, plan, output_type)
        self.maybe_free_model_hooks()
        return FluxPipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """The parts, as the `FluxPipeline` that `from_pretrained` makes a cascade of."""
        FluxPipeline(**self.components).save_pretrained(save_directory, **options)

    def _check(self, plan: Plan, image: Sequence[Any] | None, start_latents: Tensor | None, start_stage: int) -> None:
        multiple, has = 2 * pixels_per_latent(self.vae), self._attention()
        for stage in plan.stages:
            if stage.height % multiple or stage.width % multiple:
                raise ValueError(f"sides of a stage must be multiples of {multiple}, got {stage.width}x{stage.height}")
            if has not in (stage.attention, "both"):
                raise ValueError(f"a stage asks for {stage.attention} attention, and this model has {has} only")
        if (start_latents is None) != (start_stage == 0) or not 0 <= start_stage < len(plan.stages):
            raise ValueError(
                f"start_stage must be 1 to {len(plan.stages) - 1} with start_latents and 0 without, got {start_stage}"
            )
        if image is not None and start_stage > 0:
            raise ValueError("give image or start_latents, not both")
        if image is not None and plan.stages[0].sigmas() is None:
            raise ValueError("this plan begins with noise, and image would not be looked at: plan(..., enlarge=True)")
        if image is None and start_stage == 0 and plan.stages[0].strength < 1:
            raise ValueError("a plan without a stage of strength 1 enlarges a picture: give image")

    def _check_numbers(
        self,
        plan: Plan,
        batch: int,
        image: Sequence[Any] | None,
        generator: Any,
        start_latents: Tensor | None,
        start_stage: int,
    ) -> None:
        """Whether there are as many of each as of the pictures that come out."""
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"generator must be one, or a list of {batch}, one a picture, got {len(generator)}")
        if image is not None and batch % len(image):
            raise ValueError(f"image must hold a number of pictures that divides {batch}, got {len(image)}")
        if start_latents is not None:
            stage, multiple = plan.stages[start_stage - 1], 2 * pixels_per_latent(self.vae)
            tokens = stage.height * stage.width // multiple**2
            wanted = [batch, tokens, self.transformer.config.in_channels]
            if list(start_latents.shape) != wanted:
                raise ValueError(
                    f"start_latents must be {wanted}, those of stage {start_stage - 1}, got {list(start_latents.shape)}"
                )

    def _encoded(
        self,
        prefix: str,
        prompt: str | list[str] | None,
        prompt_2: str | list[str] | None,
        embeds: Tensor | None,
        pooled: Tensor | None,
        encode: dict[str, Any],
    ) -> dict[str, Any]:
        """The text of every stage, encoded once."""
        embeds, pooled, _ = self.encode_prompt(
            prompt, prompt_2, prompt_embeds=embeds, pooled_prompt_embeds=pooled, **encode
        )
        return {f"{prefix}prompt_embeds": embeds, f"{prefix}pooled_prompt_embeds": pooled}

    def _denoise(
        self, stage: Stage, clean: Tensor | None, call: dict[str, Any], generator: Any, on_step_end: Any
    ) -> Tensor:
        embeds = call["prompt_embeds"]
        scale = pixels_per_latent(self.vae)
        rows, columns = stage.height // scale, stage.width // scale
        shape = (embeds.shape[0], self.transformer.config.in_channels // 4, rows, columns)
        latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=embeds.dtype)
        sigmas = stage.sigmas()
        if clean is not None and sigmas is not None:
            clean = clean.repeat_interleave(shape[0] // clean.shape[0], 0)
            latents = ((1 - sigmas[0]) * clean + sigmas[0] * latents.float()).to(embeds.dtype)
        if stage.follow and clean is not None:
            on_step_end = _Following(stage, clean, latents, on_step_end)
        with self._scheduled(stage):
            out = FluxImg2ImgPipeline.__call__(
                self,
                image=latents,  # asked for, and not looked at beside latents
                latents=pack_latents(latents),
                height=stage.height,
                width=stage.width,
                strength=1.0,
                num_inference_steps=stage.steps,
                sigmas=sigmas,
                output_type="latent",
                callback_on_step_end=on_step_end,
                **call,
            )
        return out.images

    @contextmanager
    def _scheduled(self, stage: Stage) -> Iterator[None]:
        """A scheduler that takes the stage's noise levels as they are; stock pipelines shift them once more."""
        if stage.shift is None:
            yield
            return
        own = self.scheduler
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            own.config, use_dynamic_shifting=False, shift=1.0, shift_terminal=None
        )
        try:
            yield
        finally:
            self.scheduler = own


class _Following:
    """`callback_on_step_end` of a stage whose low frequencies follow; the user's own callback comes after."""

    def __init__(self, stage: Stage, clean: Tensor, latents: Tensor, then: OnStep | None) -> None:
        self.rows, self.columns = clean.shape[-2:]
        self.low = LowFrequencies(clean, follow=stage.follow)
        self.before = latents
        self.then = then

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        after = unpack_latents(tensors["latents"], self.rows, self.columns)
        self.before = self.low.after_step(self.before, after, *noise_levels(pipe.scheduler))
        tensors = {**tensors, "latents": pack_latents(self.before)}
        if self.then is not None:
            tensors |= self.then(pipe, step, timestep, dict(tensors))  # it need not return what it leaves alone
            self.before = unpack_latents(tensors["latents"], self.rows, self.columns)
        return tensors


def _largest_shift(scheduler: Any) -> float:
    """Of the noise levels at the scheduler's largest size; stock pipelines extrapolate beyond it, up to pure noise.

    Raises:
        ValueError: it is no flow-matching scheduler of Euler's method.
    """
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(f"scheduler must be a FlowMatchEulerDiscreteScheduler, got a {type(scheduler).__name__}")
    config = scheduler.config
    return math.exp(config.max_shift) if config.use_dynamic_shifting else scheduler.shift
