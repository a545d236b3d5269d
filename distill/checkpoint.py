"""Atomic checkpoints: the main process writes a hidden folder, syncs it, lists its files, and renames it.

`step-00000100/` holds the trained tensors, AdamW's state, their moving average if there is one, and an adapter of the
student. Data order, noise and learning rate are functions of the step, so they have no other state.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ..linearize.adapters.adapter import save_adapter
from ..linearize.adapters.fitting import check_shapes, shapes_of
from ..linearize.folders import sync, write_atomically
from .average import WeightAverage
from .files import write_json

logger = logging.getLogger(__name__)

Resume = Literal["latest"] | int  # after the newest complete checkpoint, or that of a step

MANIFEST = "checkpoint.json"
TRAINED = "trained.safetensors"
OPTIMIZER = "optimizer.safetensors"
AVERAGE = "average.safetensors"
ADAPTER = "adapter"


def save_checkpoint(
    root: Path, step: int, pipe: Any, trained: Mapping[str, nn.Parameter], optimizer: Optimizer, average: WeightAverage
) -> Path:
    """Write the checkpoint of a step, with an adapter of the pipeline; called on the main process only.

    Args:
        average: Of the trained weights; if there is one, the adapter holds it.
    Raises:
        OSError: it cannot be written, for example because the disk is full; earlier checkpoints are unchanged.
    """
    final, temporary = root / f"step-{step:08d}", root / f".step-{step:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        weights = {name: parameter.detach().contiguous() for name, parameter in trained.items()}
        write_atomically(temporary / TRAINED, partial(save_file, weights))
        write_atomically(temporary / OPTIMIZER, partial(save_file, optimizer_tensors(optimizer, trained)))
        if averaged := average.tensors():
            write_atomically(temporary / AVERAGE, partial(save_file, averaged))
        with average.applied():
            save_adapter(pipe, temporary / ADAPTER)  # for users: resuming does not read it
        files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir()) if path.is_file()}
        write_json(temporary / MANIFEST, {"step": step, "files": files})
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{final} cannot be written ({error}): free space, and continue with --resume latest") from error
    if final.exists():  # an incomplete one
        shutil.rmtree(final)
    os.rename(temporary, final)
    sync(root)
    return final


def load_checkpoint(
    path: Path, trained: Mapping[str, nn.Parameter], *, averaged: bool = False
) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint by file: `TRAINED` and `AVERAGE` by parameter, `OPTIMIZER` as `optimizer_tensors`.

    Args:
        averaged: Whether to read `AVERAGE`.
    Raises:
        ValueError: a file is damaged, or of a model with other trained tensors.
    """
    try:
        files = {name: load_file(path / name) for name in (TRAINED, OPTIMIZER, *([AVERAGE] if averaged else []))}
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} was written by an earlier version of lineardit: continue with that version, or train again"
        ) from error
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to continue after the previous checkpoint") from error
    shapes = shapes_of(trained)
    for name in files.keys() - {OPTIMIZER}:
        check_shapes(shapes_of(files[name]), shapes, what=f"the tensors of {path}")
    for name, tensor in files[OPTIMIZER].items():
        parameter, _, key = name.rpartition(".")
        if shapes.get(parameter) != tuple(tensor.shape) and (parameter not in shapes or key != "step"):
            raise ValueError(f"{path / OPTIMIZER} does not fit this model: {name} {list(tensor.shape)}")
    return files


def optimizer_tensors(optimizer: Optimizer, trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's state of each parameter, such as {"NAME.exp_avg": tensor}."""
    return {
        f"{name}.{key}": value.contiguous()
        for name, parameter in trained.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_(optimizer: Optimizer, trained: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Restore AdamW's state from the tensors of `optimizer_tensors`."""
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition(".")
        optimizer.state[trained[parameter]][key] = tensor


def latest_checkpoint(root: Path) -> tuple[Path, int] | None:
    """Folder and step of the newest complete checkpoint; None if there is none."""
    complete = complete_checkpoints(root)
    return (complete[max(complete)], max(complete)) if complete else None


def complete_checkpoints(root: Path) -> dict[int, Path]:
    """The complete checkpoints, by step."""
    return {_step(path): path for path in _checkpoints(root) if _is_complete(path)}


def step_to_resume(root: Path, resume: Resume) -> int:
    """The step after which a run continues; 0 if `"latest"` finds no complete checkpoint.

    Raises:
        ValueError: there is no complete checkpoint of this step.
    """
    complete = complete_checkpoints(root)
    if resume == "latest":
        return max(complete, default=0)
    if resume not in complete:
        existing = ", ".join(map(str, complete)) or "none"
        raise ValueError(
            f"--resume must be latest or the step of a complete checkpoint in {root} ({existing}), got {resume}"
        )
    return resume


def remove_later(root: Path, step: int) -> None:
    """Remove, and log, the checkpoints after the step at which a run resumes: its later steps may differ from them."""
    for path in _checkpoints(root):
        if _step(path) > step:
            reason = f"the run continues after step {step}" if _is_complete(path) else "it is incomplete"
            logger.warning("removing %s: %s", path, reason)
            _remove(path)


def prune_checkpoints(root: Path, keep_last: int) -> None:
    """Remove all but the newest complete checkpoints, and the leftovers of interrupted writes."""
    complete = [path for path in _checkpoints(root) if _is_complete(path)]
    for path in _checkpoints(root):
        if path not in complete[-keep_last:]:
            _remove(path)
    for path in root.glob(".step-*.tmp"):
        shutil.rmtree(path)


def _remove(path: Path) -> None:
    (path / MANIFEST).unlink(missing_ok=True)  # incomplete from here on, even if the removal is interrupted
    shutil.rmtree(path)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _checkpoints(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step-*") if path.is_dir() and re.fullmatch(r"step-\d{8,}", path.name))


def _is_complete(path: Path) -> bool:
    manifest = path / MANIFEST
    if not manifest.is_file():
        return False
    try:
        files = dict(json.loads(manifest.read_text())["files"])
    except (ValueError, KeyError, TypeError):
        return False
    return all((path / name).is_file() and (path / name).stat().st_size == size for name, size in files.items())
