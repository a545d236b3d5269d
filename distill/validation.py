"""Compares student and teacher on the held-out samples; each process takes some of them.

For final latents the student redraws the teacher's pictures; for kept calls it predicts each of them.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch.nn.functional import mse_loss
from tqdm import tqdm

from ..linearize.errors import is_out_of_memory
from ..linearize.measures.recording import to_device
from .config import DistillConfig
from .data import TeacherSamples
from .figures import StepLog, write_errors_as_warnings
from .latent_functions import latent_functions
from .pair import Pair
from .processes import make_on_main, on_main
from .sheet import write_sheet

logger = logging.getLogger(__name__)


class _SampleResult(NamedTuple):
    sample_index: int
    error: float
    pictures: list[Image.Image]  # the teacher's and the student's; none for kept calls


class Validation:
    """Validation on the held-out samples at regular steps."""

    def __init__(
        self, accelerator: Accelerator, config: DistillConfig, pipe: Any, samples: TeacherSamples, pair: Pair
    ) -> None:
        self.accelerator = accelerator
        self.pipe = pipe
        self.pair = pair
        self.samples = samples
        self.indices = range(len(samples) - config.validate.samples, len(samples))
        self.every = config.validate.every
        self.last = config.layerwise.steps + config.run.steps
        self.directory = config.run.folder
        self.column = "prediction_error" if samples.calls else "latent_mse"
        self.log: StepLog | None = None  # on the main process only

    def is_due(self, step: int) -> bool:
        return len(self.indices) > 0 and (step == self.last or step % self.every == 0)

    def start(self, step: int) -> None:
        """Continue after this step; validate it if that was due and an interrupted run did not finish it."""
        if not self.indices:
            return

        def read() -> StepLog:
            for sheet in self.directory.glob("validation-*.png"):
                if sheet.stem.removeprefix("validation-").isdecimal() and sheet > self._sheet(step):
                    sheet.unlink()  # of later steps, which the run repeats or does not reach
            return StepLog(self.directory / "validation.csv", [self.column], last_step=step)

        self.log = log = make_on_main(self.accelerator, read)
        already_logged = on_main(
            self.accelerator, lambda: log is not None and any(row["step"] == step for row in log.rows)
        )
        if step and self.is_due(step) and not already_logged:
            self.run(step)

    @torch.no_grad()
    def run(self, step: int) -> None:
        """Validate; the mean error becomes a row of validation.csv, the pictures a sheet.

        A validation that runs out of memory in any process is reported and left out: the run continues.
        """
        shares = gather_object([self._validate_share()])
        if None in shares:
            if self.accelerator.is_main_process:
                logger.warning("validation after step %d ran out of memory; the run continues without it", step)
            return
        results = sorted((one for share in shares for one in share), key=lambda one: one.sample_index)
        on_main(self.accelerator, lambda: self._write(step, results))

    def _validate_share(self) -> list[_SampleResult] | None:
        """This process's share of the samples; None: out of memory."""
        is_main, processes = self.accelerator.is_main_process, self.accelerator.num_processes
        share = self.indices[self.accelerator.process_index :: processes]
        validate = self._compare_predictions if self.samples.calls else self._compare_pictures
        try:
            return [validate(index) for index in tqdm(share, desc="validate", leave=False, disable=not is_main)]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()  # here, where no traceback holds tensors any more
        return None

    def _write(self, step: int, results: Sequence[_SampleResult]) -> None:
        assert self.log is not None, "`start` comes first"
        error = sum(one.error for one in results) / len(results)
        self.log.append({"step": step, self.column: error})
        self.accelerator.log({f"validation/{self.column}": error}, step=step)
        if results[0].pictures:
            sheet = self._sheet(step)
            with write_errors_as_warnings(sheet):
                write_sheet(["teacher", "student"], [one.pictures for one in results], sheet)

    def _sheet(self, step: int) -> Path:
        return self.directory / f"validation-{step:08d}.png"

    def _compare_predictions(self, index: int) -> _SampleResult:
        """The squared error of the predictions relative to the teacher's, averaged over a sample's calls."""
        errors = []
        for number in range(self.samples.calls):
            arguments = to_device(self.samples.call(index, number), self.pair.device)
            with self.pair.as_teacher():
                target = self.pair.predict(arguments).float()
            with self.pair.as_student():
                prediction = self.pair.predict(arguments).float()
            errors.append(float((prediction - target).square().sum() / target.square().sum()))
        return _SampleResult(index, sum(errors) / len(errors), [])

    def _compare_pictures(self, index: int) -> _SampleResult:
        """Pictures of teacher and student, and the mean squared error of their latents."""
        functions, sample = latent_functions(self.pair.model), self.samples.samples[index]
        batch = self.samples.load([index]).to(self.pair.device, self.pair.dtype)
        with self.pair.as_student():
            latents = functions.generate(
                self.pipe,
                batch.conditions,
                height=sample.height,
                width=sample.width,
                steps=self.samples.settings["steps"],
                guidance=self.samples.settings["guidance"],
                generators=[torch.Generator("cpu").manual_seed(sample.seed)],
            )
        error = float(mse_loss(latents.float(), batch.latents.float()))
        return _SampleResult(
            index, error, [functions.decode(self.pipe, one, batch.grid)[0] for one in (batch.latents, latents)]
        )
