"""Flow-matching steps with fresh noise, drawn from the generators of the pictures.

    x0 = x - sigma v,   x' = (1 - sigma') x0 + sigma' n,   sigma > sigma' the noise levels before and after the step

This is diffusers' `stochastic_sampling`. But its pipelines do not pass the generators of their call to the scheduler,
which draws n from PyTorch's global one: the same seed gives another picture each time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .low_frequencies import noise_levels


def with_fresh_noise(scheduler: Any) -> Any:
    """A scheduler like this one whose steps add fresh noise.

    Raises:
        ValueError: it is not one of flow matching.
    """
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            "stochastic steps (--stochastic) need a FlowMatchEulerDiscreteScheduler, this pipeline has a "
            f"{type(scheduler).__name__}: leave them out"
        )
    return type(scheduler).from_config(scheduler.config, stochastic_sampling=True)


@contextmanager
def draw_noise_from(scheduler: Any, generators: Any) -> Iterator[None]:
    """Inside, fresh noise comes from the call's generator, or list of one for each picture."""
    is_flow_matching = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    if generators is None or not is_flow_matching or not scheduler.config.get("stochastic_sampling"):
        yield
        return
    step, override = scheduler.step, vars(scheduler).get("step")  # set by the user

    @wraps(step)
    def seeded_step(
        model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        output = step(model_output, timestep, sample, *args, return_dict=True, **kwargs)
        before, after = noise_levels(scheduler)
        noise = randn_tensor(sample.shape, generator=generators, device=sample.device, dtype=sample.dtype)
        clean = sample.float() - before * model_output
        output.prev_sample = ((1 - after) * clean + after * noise).to(model_output.dtype)
        return output if return_dict else (output.prev_sample,)

    scheduler.step = seeded_step
    try:
        yield
    finally:
        del scheduler.step
        if override is not None:
            scheduler.step = override
