"""Passes a stage's noise levels to a stock pipeline: a scheduler that starts midway, whatever timesteps are requested.

    flow matching       x = (1 - s) z + s e, s the stage's own noise levels (`Stage.sigmas`)
    other schedulers    x = add_noise(z, e, t) of the scheduler, t the last `steps` of steps / strength timesteps, as
                        diffusers' image-to-image pipelines take them

z clean latents, e noise.
"""

import inspect
import math
from copy import deepcopy
from functools import wraps
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from torch import Tensor

from .plan import Stage

# Attributes of schedulers with one entry per step, in order.
_PER_STEP = ("timesteps", "sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down", "order_list")


def matches_flows(scheduler: Any) -> bool:
    """Whether it is a scheduler of flow matching, whose noise levels can be set one by one.

    Raises:
        ValueError: it is not, and cannot add noise to pictures at its own noise levels either.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return True
    if not hasattr(scheduler, "add_noise"):
        raise ValueError(
            "scheduler must be a FlowMatchEulerDiscreteScheduler, or have add_noise as those of Stable Diffusion do, "
            f"got a {type(scheduler).__name__}: pipe.scheduler = "
            "FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)"
        )
    return False


def largest_shift(scheduler: Any) -> float:
    """The shift of flow matching's noise levels at the scheduler's largest size; stock pipelines extrapolate it."""
    config = scheduler.config
    if not config.use_dynamic_shifting:
        return float(scheduler.shift)
    if config.time_shift_type == "linear":  # CogView4's, by the square root of the tokens
        root = math.sqrt(config.max_image_seq_len / config.base_image_seq_len)
        return float(root * config.max_shift + config.base_shift)
    return math.exp(config.max_shift)


def max_steps(scheduler: Any, strength: float) -> int:
    """The most steps that a stage of this strength can have with a scheduler other than those of flow matching."""
    if _takes_strength(scheduler):
        return int(scheduler.config.original_inference_steps * strength)
    return int(scheduler.config.num_train_timesteps * strength)


def scheduler_of(stage: Stage, scheduler: Any, device: torch.device) -> Any:
    """A scheduler like the pipeline's, set to the steps of this stage, which its `set_timesteps` always uses."""
    stage_scheduler = _copy_for_stage(scheduler)
    set_original, sigmas = stage_scheduler.set_timesteps, stage.sigmas()

    @wraps(set_original)
    def set_timesteps(*_: Any, device: Any = None, timesteps: Any = None, mu: float | None = None, **__: Any) -> None:
        if sigmas is not None:
            unshifted = None if timesteps is None else _unshifted(sigmas, mu, scheduler)
            set_original(sigmas=sigmas, device=device, **({} if unshifted is None else {"timesteps": unshifted}))
        elif _takes_strength(stage_scheduler):
            set_original(stage.steps, device=device, strength=stage.strength)
        else:
            num_steps = max(stage.steps, round(stage.steps / stage.strength))
            set_original(num_steps, device=device)
            _cut(stage_scheduler, (num_steps - stage.steps) * stage_scheduler.order)

    stage_scheduler.set_timesteps = set_timesteps
    if hasattr(stage_scheduler, "init_noise_sigma"):  # the latents that a pipeline is given are noised already
        cls = type(stage_scheduler)
        stage_scheduler.__class__ = type(cls.__name__, (cls,), {"init_noise_sigma": 1.0, "__module__": cls.__module__})
    stage_scheduler.set_timesteps(device=device)
    return stage_scheduler


def noised(scheduler: Any, clean: Tensor, noise: Tensor) -> Tensor:
    """Clean latents [B, C, h, w] and noise of the same shape, at the first noise level of `scheduler_of`."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigma = float(scheduler.sigmas[0])
        return (1 - sigma) * clean + sigma * noise
    return scheduler.add_noise(clean, noise, scheduler.timesteps[:1].repeat(len(clean)))


def _takes_strength(scheduler: Any) -> bool:
    """Whether `set_timesteps` takes a strength, as in schedulers of consistency models (LCM, TCD)."""
    return "strength" in inspect.signature(scheduler.set_timesteps).parameters


def _cut(scheduler: Any, count: int) -> None:
    """Drop the first entries of a scheduler's steps."""
    for name in _PER_STEP:
        if (values := getattr(scheduler, name, None)) is not None:
            setattr(scheduler, name, values[count:])


def _unshifted(sigmas: list[float], mu: float | None, scheduler: Any) -> list[float]:
    """Timesteps of the noise levels before the shift, which CogView4 takes."""
    config = scheduler.config
    shift = 1.0 if mu is None else mu if config.time_shift_type == "linear" else math.exp(mu)
    return [config.num_train_timesteps * sigma / (shift - (shift - 1) * sigma) for sigma in sigmas]


def _copy_for_stage(scheduler: Any) -> Any:
    """A separate scheduler for one stage."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):  # which would shift the noise levels again
        unshifted = {"use_dynamic_shifting": False, "shift": 1.0, "shift_terminal": None}
        # fresh noise is for the first stage: later ones keep the existing picture
        return type(scheduler).from_config(scheduler.config, **unshifted, stochastic_sampling=False)
    if isinstance(scheduler, PNDMScheduler):  # its first steps are special, so it cannot start midway
        last = scheduler.config.set_alpha_to_one  # which from_config omits if it is PNDM's default
        return DDIMScheduler.from_config(scheduler.config, clip_sample=False, set_alpha_to_one=last)
    return deepcopy(scheduler)
