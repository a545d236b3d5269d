"""A distillation from its settings to the saved adapter."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline

from ..kernels.pieces.results import dtype_name
from ..linearize.adapters.adapter import save_adapter
from ..linearize.adapters.base import read_base
from ..linearize.adapters.loading import load_base
from ..linearize.locks import folder_lock, remove_leftovers
from ..linearize.networks import denoiser
from ..linearize.weights.quantized import quantized_types
from .checkpoint import Resume
from .config import Base, DistillConfig, Noise
from .data import TeacherSamples
from .description import describe_run
from .figures import require_matplotlib
from .gradient_checkpointing import check_gradient_checkpointing
from .identity import architecture, fingerprint, main_dtype
from .precision import uses_autocast
from .processes import on_main, raise_together, start_accelerator
from .quantized import check_gradients
from .runs import check_run, write_run
from .student import build_student_
from .trackers import check_trackers, installed_trackers, start_trackers
from .trainer import Trainer

logger = logging.getLogger(__name__)

# Patterns of a run's files, including the suffixes that they have while they are written.
FILES = ("run.json.*", "loss.*", "validation*", "step-*", "adapter.*")


def distill(config: DistillConfig, *, resume: Resume | None = None) -> Path:
    """Run a distillation to its end; called in every process of the launch.

    Args:
        resume: Continue after the newest complete checkpoint of the run's folder, if any, or after that of a step;
            later ones are removed.
    Returns:
        The adapter's folder, `adapter` in the run's folder.
    Raises:
        ValueError: settings, data and model do not fit, the folder holds another run or is in use, or matplotlib is
            missing.
        DivergedError: a loss is not finite.
    """
    trackers = config.save.report_to
    accelerator = start_accelerator(trackers=installed_trackers(trackers), folder=config.run.folder)
    with raise_together(accelerator):
        require_matplotlib("the loss curve")
        check_trackers(trackers)
        samples = TeacherSamples(config.data.folder)
        _check_config(config, samples, accelerator.num_processes)
    with ExitStack() as locks:  # by the main process, the only one that uses the folder
        on_main(accelerator, lambda: locks.enter_context(_locked_folder(config.run.folder)))
        _check_same_samples(accelerator, samples)
        start = on_main(accelerator, lambda: check_run(config, samples.fingerprint, resume=resume))
        adapter = _train(accelerator, config, samples, start)
        accelerator.wait_for_everyone()
    accelerator.end_training()
    return adapter


def _train(accelerator: Accelerator, config: DistillConfig, samples: TeacherSamples, start: int) -> Path:
    torch.manual_seed(config.run.seed)
    with raise_together(accelerator):
        pipe = load_teacher(config.base)
        module: Any = denoiser(pipe)[1] if samples.calls else pipe  # training on calls draws no pictures
        module.to(accelerator.device)
        _check_teacher(accelerator, denoiser(pipe)[1], samples)
        check_gradients(denoiser(pipe)[1], getattr(torch, config.base.dtype))
        if config.run.gradient_checkpointing:
            check_gradient_checkpointing(denoiser(pipe)[1])
        report = build_student_(pipe, config)

    def write() -> bool:  # `uses_autocast` may measure: all use the main process's result
        return write_run(config, samples.fingerprint, start=start, mixed=uses_autocast(config, accelerator.device))

    mixed = on_main(accelerator, write)
    if accelerator.is_main_process:
        processes = accelerator.num_processes
        logger.info("%s", describe_run(config, denoiser(pipe)[1], report, samples, processes, mixed=mixed))
    start_trackers(accelerator, config)
    trainer = Trainer(accelerator, config, pipe, samples, mixed=mixed)
    trainer.restore(start)
    if start == config.layerwise.steps + config.run.steps:
        logger.info("this is the last step: nothing is left to train")
    trainer.fit(start)
    adapter = config.run.folder / "adapter"
    with trainer.average.applied():
        on_main(accelerator, lambda: save_adapter(pipe, adapter, overwrite=True))
    if accelerator.is_main_process:
        command = f"lineardit evaluate {quote(config.base.model)} {quote(str(adapter))} --prompts FILE --seed 100000"
        logger.info("the adapter is in %s; compare it with its teacher: %s", adapter, command)
    return adapter


def load_teacher(base: Base) -> Any:
    """The pipeline without its text encoders: the samples hold their outputs.

    Raises:
        ValueError: it is missing, unreachable, damaged, of a class that cannot be converted, or cannot be quantized.
    """
    found = read_base(base.model, revision=base.revision)
    parts = DiffusionPipeline.load_config(found.source.name, revision=found.source.revision)
    unused: tuple[str, ...] = ("text_encoder", "tokenizer", "image_encoder", "feature_extractor", "processor")
    if (parts.get("safety_checker") or [None, None])[1] == "StableDiffusionSafetyChecker":
        unused += ("safety_checker",)  # which needs the feature extractor
    unloaded: dict[str, Any] = {name: None for name in parts if name.startswith(unused)}
    return load_base(found, dtype=getattr(torch, base.dtype), quantization=base.quantization, **unloaded)


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    with folder_lock(folder):
        remove_leftovers(folder, FILES)
        yield


def _check_config(config: DistillConfig, samples: TeacherSamples, processes: int) -> None:
    parts = processes * config.run.gradient_accumulation
    if config.run.batch_size % parts:
        raise ValueError(
            f"run.batch_size must be a multiple of processes x run.gradient_accumulation = {parts}, "
            f"got {config.run.batch_size}"
        )
    if len(samples) <= config.validate.samples:
        raise ValueError(f"validate.samples must be < {len(samples)} (the samples), got {config.validate.samples}")
    if not samples.calls:
        return
    if config.loss.flow:
        raise ValueError(
            f"loss.flow must be 0 for {samples.directory}, which holds calls of the teacher's model without the added "
            f"noise: the student learns the teacher's predictions; got {config.loss.flow:g}"
        )
    if config.noise != Noise():
        raise ValueError(
            f"noise must be left out for {samples.directory}, whose calls already contain noise; got "
            f"mean {config.noise.mean:g}, std {config.noise.std:g}"
        )
    if config.base.dtype != samples.settings["dtype"]:
        raise ValueError(
            f"base.dtype must be {samples.settings['dtype']}, in which the calls in {samples.directory} were made, got "
            f"{config.base.dtype}; make them with `lineardit prepare --dtype {config.base.dtype}`"
        )


def _check_same_samples(accelerator: Accelerator, samples: TeacherSamples) -> None:
    """Check that all processes have the same samples: machines that share no disk read their own copy."""
    found = gather_object([samples.fingerprint])
    others = [str(process) for process, one in enumerate(found) if one != found[0]]
    with raise_together(accelerator):
        if others:
            raise ValueError(
                "data.directory must hold the same samples for all processes; those of process "
                f"{', '.join(others)} differ from those of process 0: copy {samples.directory} from its machine"
            )


def _check_teacher(accelerator: Accelerator, model: torch.nn.Module, samples: TeacherSamples) -> None:
    """Check that this model made the samples: another class or shape raises, other weights cause a warning."""
    recorded_class, model_class = samples.settings["model"], type(model).__name__
    if recorded_class != model_class or _known_to_differ(samples.settings["architecture"], architecture(model)):
        which = f"a {recorded_class}" if recorded_class != model_class else f"another {recorded_class}"
        raise ValueError(
            f"{samples.directory} was made by {which}, but base.model is a {model_class}"
            + (" of other shapes" if recorded_class == model_class else "")
            + ": run `lineardit prepare` with base.model"
        )
    dtype = samples.settings["dtype"]
    if dtype_name(main_dtype(model)) not in (dtype, "float32"):
        return  # these weights are rounded differently from those that made the samples
    if quantized_types(model):
        return  # these too
    if accelerator.is_main_process and samples.settings["teacher"] != fingerprint(model, torch.bfloat16):
        others = "quantized weights" if samples.settings.get("quantized") else "other weights than base.model's"
        logger.warning(
            "%s was made by a %s with %s: the student learns to draw what that model draws; if this is not intended, "
            "make samples with base.model",
            samples.directory,
            model_class,
            others,
        )


def _known_to_differ(one: str | None, other: str | None) -> bool:
    """Whether both are known, and differ."""
    return None not in (one, other) and one != other
