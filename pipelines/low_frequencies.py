"""Low frequencies that follow the previous stage, while the details are free (after I-Max, arXiv:2410.07536).

An Euler step of flow matching goes from x_s to x_t, t < s, along one velocity, which also gives the model's prediction
of the clean picture: x_0 = x_t - t (x_s - x_t) / (s - t). Its low frequencies are pulled towards those of the enlarged
picture r:

    x_t <- x_t + (1 - t) w_t (low(r) - low(x_0)),    w_t = follow * t

low(x) is x downsampled by `CELL` and upsampled again. w falls with the noise level, down to 0.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import interpolate

from .latents import pack_latents, unpack_latents

OnStep = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]

CELL = 4  # latents, along one side: the previous stage is half as large, and half as sharp


class LowFrequencies:
    """The correction after each step of a stage.

    Args:
        reference: r, latents [B, C, h, w].
        follow: w at noise level 1.
    """

    def __init__(self, reference: Tensor, *, follow: float) -> None:
        self.follow = follow
        self.target = _low(reference.float())

    def after_step(self, before: Tensor, after: Tensor, sigma: float, next_sigma: float) -> Tensor:
        """x_s and x_t [B, C, h, w], their noise levels s and t -> x_t corrected."""
        velocity = (before.float() - after.float()) / (sigma - next_sigma)
        predicted = after.float() - next_sigma * velocity
        weight = (1 - next_sigma) * self.follow * next_sigma
        return (after.float() + weight * (self.target - _low(predicted))).to(after.dtype)


class FollowCallback:
    """`callback_on_step_end` of a stage whose low frequencies follow; then calls the user's own.

    Args:
        clean: Latents [B, C, h, w] to follow.
        latents: Initial latents of the stage, of the same shape.
        callback: The user's callback.
    """

    def __init__(self, clean: Tensor, latents: Tensor, *, follow: float, callback: OnStep | None) -> None:
        self.low = LowFrequencies(clean, follow=follow)
        self.before = latents
        self.callback = callback

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        packed = tensors["latents"].ndim == 3
        after = self._planes(tensors["latents"])
        self.before = self.low.after_step(self.before, after, *noise_levels(pipe.scheduler))
        tensors = {**tensors, "latents": pack_latents(self.before) if packed else self.before}
        if self.callback is not None:
            tensors |= self.callback(pipe, step, timestep, dict(tensors))  # it may return changed tensors only
            self.before = self._planes(tensors["latents"])
        return tensors

    def _planes(self, latents: Tensor) -> Tensor:
        return unpack_latents(latents, *self.before.shape[-2:]) if latents.ndim == 3 else latents


def noise_levels(scheduler: Any) -> tuple[float, float]:
    """Noise levels before and after the last step of a flow-matching scheduler."""
    return float(scheduler.sigmas[scheduler.step_index - 1]), float(scheduler.sigmas[scheduler.step_index])


def _low(x: Tensor) -> Tensor:
    cells = [max(1, side // CELL) for side in x.shape[-2:]]
    small = interpolate(x, size=cells, mode="bilinear", antialias=True)
    return interpolate(small, size=x.shape[-2:], mode="bilinear")
