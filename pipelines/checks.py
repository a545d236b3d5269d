"""Checks of a cascade's call, made before the first step and not when the stage in question runs.

B pictures; latents are [B, C, h, w], or [B, N, C] where the model takes FLUX's tokens.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .plan import Limits, Plan, Settings, Stage
from .stage_schedule import max_steps


def check_plan(plan: Plan, height: int | None, width: int | None, steps: int | None, settings: object) -> None:
    """Raise a ValueError if arguments of a call that are not None contradict its plan."""
    if not isinstance(plan, Plan):
        raise ValueError(f"plan must be what `plan(height, width)` returns, or None, got {plan!r}")
    if settings is not None:
        raise ValueError("settings must be left out if a plan is given: pass them to `plan(..., settings=...)`")
    if (height or plan.height, width or plan.width) != (plan.height, plan.width):
        raise ValueError(f"height and width must be the plan's, {plan.height} and {plan.width}, or left out")
    planned = plan.stages[0].steps
    if steps not in (None, planned):
        raise ValueError(
            f"num_inference_steps must be {planned}, as in the plan's first stage, or left out, got {steps}: "
            "`plan(..., num_inference_steps=...)` makes another plan"
        )


def check_misplaced(call: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise a TypeError for an argument that is not `known` and is a setting of the stages after the first."""
    for name in call.keys() & {field.name for field in fields(Settings)} - set(known):
        raise TypeError(
            f"{name} is a setting of the stages after the first: settings=lineardit.pipelines.Settings({name}="
            f"{call[name]!r})"
        )


def check_stages(plan: Plan, limits: Limits, scheduler: Any) -> None:
    """Raise a ValueError for a stage that the model or its scheduler cannot make."""
    for stage in plan.stages:
        multiple, size = limits.multiple, f"{stage.width}x{stage.height}"
        if stage.height % multiple or stage.width % multiple:
            raise ValueError(f"sides of a stage must be multiples of {multiple}, got {size}")
        if limits.largest is not None and max(stage.height, stage.width) > limits.largest:
            raise ValueError(
                f"this model has positions for at most {limits.largest} pixels a side, got {size}: generate "
                "that size, and enlarge it by other means"
            )
        if limits.attention not in (stage.attention, "both"):
            raise ValueError(
                f"a stage asks for {stage.attention} attention, but this model has only {limits.attention} attention"
            )
        _check_sigmas(stage, limits, scheduler)
        if limits.rope_dim is None and stage.rope_factor != 1:
            raise ValueError(
                f"this model has no rotary base to scale, so rope_factor must be 1, got {stage.rope_factor}"
            )
        if not limits.counts_tokens and stage.logit_factor != 1:
            raise ValueError(f"proportional attention needs a transformer: leave it out, got {stage.logit_factor}")
        if not limits.chunks and stage.chunk_tokens is not None:
            raise ValueError(
                f"this model does not run in chunks of tokens: leave chunk_tokens out, got {stage.chunk_tokens}"
            )


def _check_sigmas(stage: Stage, limits: Limits, scheduler: Any) -> None:
    """Raise a ValueError if the scheduler does not support a stage's noise levels, or settings that depend on them."""
    flows, name = limits.largest_shift is not None, type(scheduler).__name__
    if flows and stage.shift is None and stage.strength < 1:
        raise ValueError("shift must be set for a stage with strength below 1, got None")
    if not flows and stage.shift is not None:
        raise ValueError(f"shift needs a flow-matching scheduler, not a {name}: leave it out, got {stage.shift}")
    if not limits.follows and stage.follow:
        raise ValueError(
            f"follow needs flow matching and a pipeline with callback_on_step_end, the scheduler is a {name}: "
            f"leave it out, got {stage.follow}"
        )
    if not flows and not stage.is_stock and stage.steps > (limit := max_steps(scheduler, stage.strength)):
        raise ValueError(
            f"a {name} has at most {limit} steps at strength {stage.strength:g}, got {stage.steps}: use fewer, or a "
            "higher strength"
        )


def check_counts(batch: int, text_len: int | None) -> None:
    """Raise a ValueError if these are not valid numbers of pictures and text tokens."""
    for name, number in (("batch", batch), ("text_len", text_len)):
        is_left_out = number is None and name == "text_len"
        if not is_left_out and (type(number) is not int or number < 1):
            raise ValueError(f"{name} must be an integer >= 1, got {number!r}")


def check_output_type(output_type: str) -> None:
    """Raise a ValueError for an unknown output type."""
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type must be pil, np, pt or latent, got {output_type!r}")


def check_start(plan: Plan, image: Sequence[Any] | None, start_latents: Tensor | None, start_stage: int) -> None:
    """Raise a ValueError if plan, input pictures and initial latents do not fit."""
    if (start_latents is None) != (start_stage == 0) or not 0 <= start_stage < len(plan.stages):
        raise ValueError(
            f"start_stage must be 1 to {len(plan.stages) - 1} with start_latents and 0 without, got {start_stage}"
        )
    if image is not None and start_stage > 0:
        raise ValueError("give image or start_latents, not both")
    if image is not None and plan.stages[0].is_stock:
        raise ValueError("this plan starts from noise and would ignore image: use plan(..., enlarge=True)")
    if image is None and start_stage == 0 and plan.stages[0].strength < 1:
        raise ValueError("this plan enlarges a picture, since its first stage has strength below 1: give image")


def count_pictures(prompt: Any, call: Mapping[str, Any]) -> int:
    """B, from prompts as text or as embeddings.

    Raises:
        ValueError: there is neither, or both.
    """
    embeddings = [value for name, value in call.items() if name.startswith("prompt_embeds") and value is not None]
    if (prompt is None) != bool(embeddings):
        raise ValueError("Provide either `prompt` or `prompt_embeds`, and not both")
    if prompt is not None and not isinstance(prompt, str | list):
        raise ValueError(f"prompt must be a string or a list of strings, got a {type(prompt).__name__}")
    if prompt == []:
        raise ValueError("prompt must hold at least one string, got an empty list")
    prompts = [prompt] if isinstance(prompt, str) else prompt or embeddings[0]
    return len(prompts) * (call.get("num_images_per_prompt") or 1)


def check_numbers(
    batch: int, image: Sequence[Any] | None, generator: Any, latents: Tensor | None, shape: Sequence[int], stage: int
) -> None:
    """Raise a ValueError if the numbers of input pictures, generators or latents do not fit that of the outputs.

    Args:
        batch: Number of output pictures.
        latents: To continue with after stage `stage`, of shape [batch, *shape].
    """
    generators = generator if isinstance(generator, list) else [generator]
    if not all(one is None or isinstance(one, torch.Generator) for one in generators):
        raise ValueError(
            f"generator must be a torch.Generator, or a list of them, got a {type(generators[0]).__name__}"
        )
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"generator must be one, or a list of {batch}, one per picture, got {len(generator)}")
    if image is not None and batch % len(image):
        raise ValueError(f"image must hold a number of pictures that divides {batch}, got {len(image)}")
    if latents is not None and list(latents.shape) != [batch, *shape]:
        raise ValueError(f"start_latents of stage {stage} must be {[batch, *shape]}, got {list(latents.shape)}")
