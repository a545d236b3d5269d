"""The training loop of a student, on any number of processes.

The training inputs are in `batches.py`, the objective in `losses.py`. Steps are counted from 1 over both phases: first
those layer by layer (`layerwise.py`), if any, then those end to end.
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from ..linearize.networks import denoiser
from .average import WeightAverage
from .batches import Batches
from .checkpoint import (
    AVERAGE,
    OPTIMIZER,
    TRAINED,
    complete_checkpoints,
    load_checkpoint,
    load_optimizer_,
    prune_checkpoints,
    remove_later,
    save_checkpoint,
)
from .config import DistillConfig
from .data import TeacherSamples
from .diverged import check_finite
from .figures import StepLog
from .gradient_checkpointing import enable_gradient_checkpointing_
from .layerwise import layerwise_training
from .losses import loss_terms, weighted_sum
from .pair import Pair
from .processes import average_gradients, broadcast_tensors, make_on_main, on_main
from .schedule import learning_rate
from .validation import Validation

logger = logging.getLogger(__name__)


class Trainer:
    """One student in training.

    Args:
        pipe: Its model is a student of `build_student_`, on the accelerator's device; so are all parts if it draws.
        mixed: Whether the student computes in bfloat16.
    """

    def __init__(
        self, accelerator: Accelerator, config: DistillConfig, pipe: Any, samples: TeacherSamples, *, mixed: bool
    ) -> None:
        self.accelerator = accelerator
        self.config = config
        self.pipe = pipe
        self.directory = config.run.folder
        self.layerwise_steps = config.layerwise.steps
        self.last_step = config.layerwise.steps + config.run.steps
        self.started = 0  # the step after which this process began
        model: Any = denoiser(pipe)[1]
        if config.run.gradient_checkpointing:
            enable_gradient_checkpointing_(model)
        model.eval()  # as when the samples were made: in training mode HiDream returns its padding as well
        pipe.set_progress_bar_config(disable=True)
        self.pair = Pair(model, device=accelerator.device, dtype=getattr(torch, config.base.dtype), mixed=mixed)
        self.trained = self.pair.trained
        self.weights = {name: weight for name, weight in asdict(config.loss).items() if weight}
        settings = config.optimizer
        adamw: dict[str, Any] = {name: getattr(settings, name) for name in ("lr", "betas", "eps", "weight_decay")}
        self.optimizer = torch.optim.AdamW(self.trained.values(), **adamw, fused=True)
        self.batches = Batches(accelerator, config, pipe, samples)
        self.validation = Validation(accelerator, config, pipe, samples, self.pair)
        self._broadcast_weights(self.trained)
        self.average = WeightAverage(self.trained, config.trained.ema)

    def fit(self, start: int) -> None:
        """Train the steps after `start` to the last one, with checkpoints, curve and validation on the way."""
        save = self.config.save
        self.started = start
        with self.average.applied():
            self.validation.start(start)
        log = make_on_main(self.accelerator, lambda: self._log(start))
        began = time.perf_counter() - (log.rows[-1].get("seconds", 0.0) if log and log.rows else 0.0)
        with tqdm(total=self.last_step, initial=start, desc="distill", unit="step", disable=log is None) as progress:
            for step in range(start + 1, self.last_step + 1):
                row = self.step(step)
                progress.update()
                progress.set_postfix(loss=f"{row['loss']:.4f}")
                self.accelerator.log(row, step=step)
                last = step == self.last_step
                if log:
                    log.append({"step": step, **row, "seconds": round(time.perf_counter() - began, 3)})
                    if last or step % save.log_every == 0:
                        log.draw(self.directory / "loss.png", layerwise=self.layerwise_steps)
                if last or step % save.every == 0:
                    self._save(step)
                if self.validation.is_due(step):
                    with self.average.applied():
                        self.validation.run(step)
                progress.unpause()  # the estimate of the time left is based on steps only

    def step(self, step: int) -> dict[str, float]:
        """Run one update; returns the loss terms over the whole batch, and the learning rate."""
        if step == self.layerwise_steps + 1:
            self.optimizer.state.clear()  # AdamW's state comes from another loss
            self.average.begin()
        rate = learning_rate(self.config, step - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        row = self._layer_by_layer(step) if step <= self.layerwise_steps else self._end_to_end(step)
        self._check_finite(row, step)
        average_gradients(self.accelerator, self.trained.values())
        norm = clip_grad_norm_(self.trained.values(), self.config.optimizer.max_grad_norm)
        self._check_finite({"gradient": float(norm)}, step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step()
        return row | {"loss": sum(self.weights.get(name, 1) * value for name, value in row.items()), "lr": rate}

    def _layer_by_layer(self, step: int) -> dict[str, float]:
        """Accumulate gradients of the first phase's loss; returns its mean over layers."""
        pair, micro_batches = self.pair, list(self.batches.micro_batches(step))
        sums = torch.zeros(len(pair.layers), device=pair.device)
        for micro_batch in micro_batches:
            with (
                torch.no_grad(),
                layerwise_training(pair.model, pair.as_student, loss_scale=1 / len(micro_batches)) as errors,
                pair.native(),
            ):
                pair.predict(micro_batch.arguments)
            sums += torch.stack([errors[name] for name in pair.layers])
        return {"layerwise": self.accelerator.reduce(sums / len(micro_batches), "mean").mean().item()}

    def _end_to_end(self, step: int) -> dict[str, float]:
        """Accumulate gradients of the objective; returns its terms."""
        micro_batches = list(self.batches.micro_batches(step))
        sums = torch.zeros(len(self.weights), device=self.pair.device)
        for micro_batch in micro_batches:
            terms = loss_terms(self.pair, micro_batch, self.weights)
            (weighted_sum(terms, self.config.loss) / len(micro_batches)).backward()
            sums += torch.stack([terms[name].detach() for name in self.weights])
        means = self.accelerator.reduce(sums / len(micro_batches), "mean").tolist()
        return dict(zip(self.weights, means, strict=True))

    def _check_finite(self, values: Mapping[str, float], step: int) -> None:
        """Raise a DivergedError if a value, the same in all processes, is not finite; the main one words it."""
        if not all(map(math.isfinite, values.values())):
            on_main(self.accelerator, lambda: check_finite(values, step, self.config, self.started))

    def _log(self, start: int) -> StepLog:
        terms = [*(["layerwise"] if self.layerwise_steps else []), *self.weights]
        return StepLog(self.directory / "loss.csv", [*terms, "loss", "lr", "seconds"], last_step=start)

    def _save(self, step: int) -> None:
        def write() -> None:
            save_checkpoint(self.directory, step, self.pipe, self.trained, self.optimizer, self.average)
            prune_checkpoints(self.directory, self.config.save.keep_last)

        on_main(self.accelerator, write)

    def restore(self, step: int) -> None:
        """Restore the checkpoint of this step (0: none), read by the main process; later ones are removed."""
        files: dict[str, dict[str, Tensor]] = {TRAINED: {}, OPTIMIZER: {}, AVERAGE: {}}
        averaged = self.average.ema is not None

        def read() -> None:
            if step:
                folder = complete_checkpoints(self.directory)[step]
                files.update(load_checkpoint(folder, self.trained, averaged=averaged))
            remove_later(self.directory, step)

        on_main(self.accelerator, read)
        if not step:
            return
        self._broadcast_weights(files[TRAINED])
        load_optimizer_(self.optimizer, self.trained, dict(broadcast_tensors(self.accelerator, files[OPTIMIZER])))
        averages = dict(broadcast_tensors(self.accelerator, files[AVERAGE]))
        self.average.load_tensors_(averages, steps=step - self.layerwise_steps if step > self.layerwise_steps else step)
        logger.info("continuing after step %d", step)

    def _broadcast_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the main process's tensors into the trained weights of every process."""
        for name, tensor in broadcast_tensors(self.accelerator, tensors):
            self.trained[name].data.copy_(tensor)
