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
_OF_EACH_STEP = ("timesteps", "sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down", "order_list")


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


def most_steps(scheduler: Any, strength: float) -> int:
    """The most steps that a stage of this strength can have with a scheduler other than those of flow matching."""
    if _takes_strength(scheduler):
        return int(scheduler.config.original_inference_steps * strength)
    return int(scheduler.config.num_train_timesteps * strength)


def scheduler_of(stage: Stage, scheduler: Any, device: torch.device) -> Any:
    """A scheduler like the pipeline's, set to the steps of this stage, which its `set_timesteps` always uses."""
    made = _plain(scheduler)
    set_all, sigmas = made.set_timesteps, stage.sigmas()

    @wraps(set_all)
    def set_timesteps(*_: Any, device: Any = None, timesteps: Any = None, mu: float | None = None, **__: Any) -> None:
        if sigmas is not None:
            told = None if timesteps is None else _unshifted(sigmas, mu, scheduler)
            set_all(sigmas=sigmas, device=device, **({} if told is None else {"timesteps": told}))
        elif _takes_strength(made):
            set_all(stage.steps, device=device, strength=stage.strength)
        else:
            whole = max(stage.steps, round(stage.steps / stage.strength))
            set_all(whole, device=device)
            _cut(made, (whole - stage.steps) * made.order)

    made.set_timesteps = set_timesteps
    if hasattr(made, "init_noise_sigma"):  # the latents that a pipeline is given are noised already
        cls = type(made)
        made.__class__ = type(cls.__name__, (cls,), {"init_noise_sigma": 1.0, "__module__": cls.__module__})
    made.set_timesteps(device=device)
    return made


def noised(scheduler: Any, clean: Tensor, noise: Tensor) -> Tensor:
    """Clean latents [B, C, h, w] and noise of the same shape, at the first noise level of `scheduler_of`."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigma = float(scheduler.sigmas[0])
        return (1 - sigma) * clean + sigma * noise
    return scheduler.add_noise(clean, noise, scheduler.timesteps[:1].repeat(len(clean)))


def _takes_strength(scheduler: Any) -> bool:
    """Whether `set_timesteps` takes a strength, as in schedulers of consistency models (LCM, TCD)."""
    return "strength" in inspect.signature(scheduler.set_timesteps).parameters


def _cut(scheduler: Any, first: int) -> None:
    """Drop the first entries of a scheduler's steps."""
    for name in _OF_EACH_STEP:
        if (values := getattr(scheduler, name, None)) is not None:
            setattr(scheduler, name, values[first:])


def _unshifted(sigmas: list[float], mu: float | None, scheduler: Any) -> list[float]:
    """Timesteps of the noise levels before the shift, which CogView4 takes."""
    config = scheduler.config
    shift = 1.0 if mu is None else mu if config.time_shift_type == "linear" else math.exp(mu)
    return [config.num_train_timesteps * sigma / (shift - (shift - 1) * sigma) for sigma in sigmas]


def _plain(scheduler: Any) -> Any:
    """A separate scheduler for one stage."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):  # which would shift the noise levels again
        unshifted = {"use_dynamic_shifting": False, "shift": 1.0, "shift_terminal": None}
        # fresh noise is for the first stage: later ones keep the existing picture
        return type(scheduler).from_config(scheduler.config, **unshifted, stochastic_sampling=False)
    if isinstance(scheduler, PNDMScheduler):  # its first steps are special, so it cannot start midway
        last = scheduler.config.set_alpha_to_one  # which from_config omits if it is PNDM's default
        return DDIMScheduler.from_config(scheduler.config, clip_sample=False, set_alpha_to_one=last)
    return deepcopy(scheduler)
