"""One student in training: the teacher's forward, the student's, one loss, one step, on any number of processes.

Steps are counted from 1 over both stages: first those layer by layer (`layerwise.py`), if any, then those end to end.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from ..linearize.convert import swapped
from ..linearize.measures.recording import predict, to_device
from ..linearize.networks import denoiser
from .checkpoint import (
    OPTIMIZER,
    TRAINED,
    load_checkpoint,
    prune_checkpoints,
    remember_,
    remove_later,
    save_checkpoint,
    whole_checkpoints,
)
from .config import DistillConfig
from .data import Batch, Order, TeacherSamples, counter_generator
from .diverged import check_finite
from .families import family_of
from .figures import StepLog
from .layerwise import lessons
from .losses import attention_loss, attention_outputs, flow_loss, prediction_loss, weighted_sum
from .processes import average_gradients, main_has, on_main, tensors_of_main
from .schedule import learning_rate, noise_levels
from .student import teacher, trained_parameters
from .validation import Validation

logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """One forward to learn from: the model's arguments, and what made them, where that is known."""

    arguments: Mapping[str, Any]
    latents: Tensor | None = None  # [B, N, C]
    noise: Tensor | None = None


class Trainer:
    """One student in training.

    Args:
        pipe: Its model is a student of `build_student_`, on the accelerator's device; all of it where it draws.
        mixed: Whether the student computes in bfloat16.
    """

    def __init__(
        self, accelerator: Accelerator, config: DistillConfig, pipe: Any, samples: TeacherSamples, *, mixed: bool
    ) -> None:
        self.accelerator = accelerator
        self.config = config
        self.pipe = pipe
        self.samples = samples
        self.directory = config.run.folder
        self.model = cast(Any, denoiser(pipe)[1])
        self.layers = swapped(self.model)
        self.weights = {name: weight for name, weight in asdict(config.loss).items() if weight}
        self.dtype = getattr(torch, config.base.dtype)
        self.mixed = mixed
        if config.run.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.model.eval()  # as the samples were made: HiDream in training returns its padding as well
        pipe.set_progress_bar_config(disable=True)
        self.trained = trained_parameters(self.model)
        self.started = 0  # the step behind which this process began
        self.order = Order(
            samples.samples[: len(samples) - config.validate.samples],
            batch_size=config.run.batch_size,
            seed=config.run.seed,
        )
        settings = config.optimizer
        adamw: dict[str, Any] = {name: getattr(settings, name) for name in ("lr", "betas", "eps", "weight_decay")}
        self.optimizer = torch.optim.AdamW(self.trained.values(), **adamw, fused=True)
        self._train_from(self.trained)
        precisions = {"student": self._autocast, "teacher": self._native}
        self.validation = Validation(accelerator, config, pipe, samples, **precisions)

    def _train_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Give every process the main one's."""
        for name, tensor in tensors_of_main(self.accelerator, tensors):
            self.trained[name].data.copy_(tensor)

    def restore(self, step: int) -> None:
        """Go back to the checkpoint of this step, which the main process reads; 0: none. Later ones are removed."""
        files: dict[str, dict[str, Tensor]] = {TRAINED: {}, OPTIMIZER: {}}

        def read() -> None:
            if step:
                files.update(load_checkpoint(whole_checkpoints(self.directory)[step], self.trained))
            remove_later(self.directory, step)

        on_main(self.accelerator, read)
        if not step:
            return
        self._train_from(files[TRAINED])
        remember_(self.optimizer, self.trained, dict(tensors_of_main(self.accelerator, files[OPTIMIZER])))
        logger.info("going on after step %d", step)

    def fit(self, start: int) -> None:
        """Train from step `start` to the last one, with checkpoints, curve and validation on the way."""
        config, main = self.config, self.accelerator.is_main_process
        self.started = start
        self.validation.start(start)
        first = config.layerwise.steps
        last_step = first + config.run.steps
        columns = [*(["layerwise"] if first else []), *self.weights, "loss", "lr", "seconds"]
        log = main_has(self.accelerator, lambda: StepLog(self.directory / "loss.csv", columns, last_step=start))
        began = time.perf_counter() - (log.rows[-1]["seconds"] if log and log.rows else 0.0)
        progress = tqdm(total=last_step, initial=start, desc="distill", unit="step", disable=not main)
        for step in range(start + 1, last_step + 1):
            row = self.step(step)
            progress.update()
            progress.set_postfix(loss=f"{row['loss']:.4f}")
            last = step == last_step
            if log:
                log.append({"step": step, **row, "seconds": round(time.perf_counter() - began, 3)})
                if last or step % config.save.log_every == 0:
                    log.draw(self.directory / "loss.png", first_stage=first)
            if last or step % config.save.every == 0:
                on_main(self.accelerator, partial(self._save, step))
            if self.validation.is_due(step):
                self.validation.run(step)
            progress.unpause()  # the time left is that of steps
        progress.close()

    def _save(self, step: int) -> None:
        save_checkpoint(self.directory, step, self.pipe, self.trained, self.optimizer)
        prune_checkpoints(self.directory, self.config.save.keep_last)

    def step(self, step: int) -> dict[str, float]:
        """One update; the loss terms over the whole batch, and the learning rate."""
        first = self.config.layerwise.steps
        if step == first + 1:
            self.optimizer.state.clear()  # what AdamW remembers is of another loss
        rate = learning_rate(self.config, step - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parts = list(self._parts(step))
        row = self._layer_by_layer(parts) if step <= first else self._end_to_end(parts)
        self._check_finite(row, step)
        average_gradients(self.accelerator, self.trained.values())
        norm = clip_grad_norm_(self.trained.values(), self.config.optimizer.max_grad_norm)
        self._check_finite({"gradient": float(norm)}, step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return row | {"loss": sum(self.weights.get(name, 1) * value for name, value in row.items()), "lr": rate}

    def _check_finite(self, values: Mapping[str, float], step: int) -> None:
        """Raise a DivergedError where a value that all processes share is no number; the main one words it."""
        if not all(map(math.isfinite, values.values())):
            on_main(self.accelerator, lambda: check_finite(values, step, self.config, self.started))

    def _layer_by_layer(self, parts: Sequence[Part]) -> dict[str, float]:
        """Gradients of the first stage's loss, and its mean over layers."""
        sums = torch.zeros(len(self.layers), device=self.accelerator.device)
        for part in parts:
            with torch.no_grad(), lessons(self.model, self._autocast, share=1 / len(parts)) as errors, self._native():
                predict(self.model, to_device(part.arguments, self.accelerator.device))
            sums += torch.stack([errors[name] for name in self.layers])
        return {"layerwise": self.accelerator.reduce(sums / len(parts), "mean").mean().item()}

    def _end_to_end(self, parts: Sequence[Part]) -> dict[str, float]:
        """Gradients of the objective, and its terms."""
        sums = torch.zeros(len(self.weights), device=self.accelerator.device)
        for part in parts:
            terms = self.terms(part)
            (weighted_sum(terms, self.config.loss) / len(parts)).backward()
            sums += torch.stack([terms[name].detach() for name in self.weights])
        means = self.accelerator.reduce(sums / len(parts), "mean").tolist()
        return dict(zip(self.weights, means, strict=True))

    def _parts(self, step: int) -> Iterator[Part]:
        """This process' share of the step's batch, in parts that fit the memory."""
        run, accelerator = self.config.run, self.accelerator
        size = run.batch_size // (accelerator.num_processes * run.gradient_accumulation)
        chosen = self.order.batch(step - 1)
        first = accelerator.process_index * size * run.gradient_accumulation
        for start in range(first, first + size * run.gradient_accumulation, size):
            places = range(start, start + size)
            generators = [counter_generator(run.seed, step, place) for place in places]
            uniform = torch.stack([torch.rand((), generator=generator) for generator in generators])
            indices = chosen[start : start + size]
            if self.samples.calls:
                yield from self._kept_calls(indices, (torch.tensor(places) + uniform) / run.batch_size)
            else:
                batch = self.samples.load(indices)
                noise = torch.stack([torch.randn(batch.latents.shape[1:], generator=one) for one in generators])
                yield self._noised(batch, noise, noise_levels(self.config, places, uniform))

    def _noised(self, batch: Batch, noise: Tensor, levels: Tensor) -> Part:
        """These samples with this noise, [B, N, C] and [B]."""
        device, family = self.accelerator.device, family_of(self.model)
        sigma = family.shift(self.pipe.scheduler, levels, batch.grid).to(device)
        batch, noise = batch.to(device, self.dtype), noise.to(device)
        share = sigma[:, None, None]
        noisy = ((1 - share) * batch.latents.float() + share * noise).to(self.dtype)
        guidance = self.samples.settings["guidance"]
        arguments = family.inputs(self.model, noisy, sigma, batch.conditions, grid=batch.grid, guidance=guidance)
        return Part(arguments, batch.latents, noise)

    def _kept_calls(self, indices: Sequence[int], levels: Tensor) -> Iterator[Part]:
        """A call of each of these samples; levels in [0, 1) say which, in the order of denoising."""
        for index, level in zip(indices, levels.tolist(), strict=True):
            number = min(int(level * self.samples.calls), self.samples.calls - 1)  # a level may be rounded to 1
            yield Part(self.samples.call(index, number))

    def terms(self, part: Part) -> dict[str, Tensor]:
        """The loss terms whose weight is not 0."""
        arguments = to_device(part.arguments, self.accelerator.device)
        layers = self.layers if "attention" in self.weights else {}
        wanted = {}
        if "prediction" in self.weights or layers:
            with teacher(self.model), attention_outputs(layers) as wanted, self._native():
                target = predict(self.model, arguments)
        with attention_outputs(layers) as given, self._autocast():
            prediction = predict(self.model, arguments)
        compute: Mapping[str, Callable[[], Tensor]] = {
            "flow": lambda: flow_loss(prediction, cast(Tensor, part.latents), cast(Tensor, part.noise)),
            "prediction": lambda: prediction_loss(prediction, target),
            "attention": lambda: attention_loss(given, wanted),
        }
        return {name: compute[name]() for name in self.weights}

    def _autocast(self) -> AbstractContextManager[Any]:
        """The student's precision."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.mixed)

    def _native(self) -> AbstractContextManager[Any]:
        """The teacher's: a base in bfloat16 needs no autocast, and is the original to the last bit without it."""
        return nullcontext() if self.dtype == torch.bfloat16 else self._autocast()
