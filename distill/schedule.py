"""The learning rate and the noise levels of each step."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .config import DistillConfig


def learning_rate(config: DistillConfig, step: int) -> float:
    """The rate of a step, counted from 0; each of the two phases has a full schedule."""
    schedule, first = config.schedule, config.layerwise
    if step < first.steps:
        rate, steps, warmup = first.lr, first.steps, first.warmup
    else:
        rate, steps, warmup = config.optimizer.lr, config.run.steps, schedule.warmup
        step -= first.steps
    if step < warmup:
        return rate * (step + 1) / warmup
    if schedule.kind == "constant":
        return rate
    progress = (step - warmup) / max(1, steps - warmup)
    return rate * (schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * progress)) / 2)


def noise_levels(config: DistillConfig, positions: Sequence[int], uniform: Tensor) -> Tensor:
    """sigma of these places of a batch, before the shift; `uniform` [len(places)] are random numbers in [0, 1).

    Stratified: each place samples its own of `run.batch_size` equal shares of the distribution, so that all steps have
    the same mix of noise levels, and the loss varies less.
    """
    share = ((torch.tensor(positions) + uniform) / config.run.batch_size).clamp(1e-6, 1 - 1e-6)  # ndtri(0) is infinite
    return torch.sigmoid(config.noise.mean + config.noise.std * torch.special.ndtri(share))
