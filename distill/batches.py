"""The training inputs of each step: arguments of the model's forwards, determined by seed and step alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ..linearize.networks import denoiser
from .config import DistillConfig
from .data import Batch, BatchOrder, TeacherSamples, counter_generator
from .latent_functions import latent_functions
from .schedule import noise_levels


class MicroBatch(NamedTuple):
    """One training forward: the model's arguments, and the latents and noise behind them where they are known."""

    arguments: Mapping[str, Any]
    latents: Tensor | None = None  # [B, N, C]
    noise: Tensor | None = None


class Batches:
    """The batches of all steps; each process takes its share.

    Args:
        samples: The last `validate.samples` of them are held out.
    """

    def __init__(self, accelerator: Accelerator, config: DistillConfig, pipe: Any, samples: TeacherSamples) -> None:
        self.accelerator = accelerator
        self.config = config
        self.pipe = pipe
        self.samples = samples
        self.dtype = getattr(torch, config.base.dtype)
        self.order = BatchOrder(
            samples.samples[: len(samples) - config.validate.samples],
            batch_size=config.run.batch_size,
            seed=config.run.seed,
        )

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """This process's share of the step's batch, split for gradient accumulation."""
        run, accelerator = self.config.run, self.accelerator
        size = run.batch_size // (accelerator.num_processes * run.gradient_accumulation)
        batch_indices = self.order.batch(step - 1)
        first = accelerator.process_index * size * run.gradient_accumulation
        for start in range(first, first + size * run.gradient_accumulation, size):
            positions = range(start, start + size)
            generators = [counter_generator(run.seed, step, position) for position in positions]
            uniform = torch.stack([torch.rand((), generator=generator) for generator in generators])
            indices = batch_indices[start : start + size]
            if self.samples.calls:
                yield from self._kept_calls(indices, (torch.tensor(positions) + uniform) / run.batch_size)
            else:
                batch = self.samples.load(indices)
                noise = torch.stack([torch.randn(batch.latents.shape[1:], generator=one) for one in generators])
                yield self._add_noise(batch, noise, noise_levels(self.config, positions, uniform))

    def _add_noise(self, batch: Batch, noise: Tensor, unshifted: Tensor) -> MicroBatch:
        """The samples mixed with noise [B, N, C] at noise levels [B], which are given before the shift."""
        device, model = self.accelerator.device, denoiser(self.pipe)[1]
        functions = latent_functions(model)
        sigma = functions.shift(self.pipe.scheduler, unshifted, batch.grid).to(device)
        batch, noise = batch.to(device, self.dtype), noise.to(device)
        share = sigma[:, None, None]
        noisy = ((1 - share) * batch.latents.float() + share * noise).to(self.dtype)
        guidance = self.samples.settings["guidance"]
        arguments = functions.inputs(model, noisy, sigma, batch.conditions, grid=batch.grid, guidance=guidance)
        return MicroBatch(arguments, batch.latents, noise)

    def _kept_calls(self, indices: Sequence[int], shares: Tensor) -> Iterator[MicroBatch]:
        """One call of each sample, the one at this share in [0, 1) of its denoising."""
        for index, share in zip(indices, shares.tolist(), strict=True):
            number = min(int(share * self.samples.calls), self.samples.calls - 1)  # a share may be rounded to 1
            yield MicroBatch(self.samples.call(index, number))
