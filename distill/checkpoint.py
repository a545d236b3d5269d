"""Checkpoints that are whole or not there: written by the main process into a hidden folder, synced, listed, renamed.

`step-00000100/` holds the trained tensors, AdamW's state, their moving average if there is one, and an adapter of the
student as it would be saved. The order of the data, the noise and the learning rate are functions of the step, so that
the step's number is their state.
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
from ..linearize.folders import sync, write_whole
from .average import Average
from .files import write_json

logger = logging.getLogger(__name__)

Resume = Literal["latest"] | int  # after the newest whole checkpoint, or that of a step

MANIFEST = "checkpoint.json"
TRAINED = "trained.safetensors"
OPTIMIZER = "optimizer.safetensors"
AVERAGE = "average.safetensors"
ADAPTER = "adapter"


def save_checkpoint(
    root: Path, step: int, pipe: Any, trained: Mapping[str, nn.Parameter], optimizer: Optimizer, average: Average
) -> Path:
    """Write the checkpoint of a step, with the adapter of this pipeline; the main process calls it.

    Args:
        average: Of the trained weights; the adapter has it.
    Raises:
        OSError: it cannot be written, for example because the disk is full; the checkpoints before it are as they were.
    """
    final, temporary = root / f"step-{step:08d}", root / f".step-{step:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        weights = {name: one.detach().contiguous() for name, one in trained.items()}
        write_whole(temporary / TRAINED, partial(save_file, weights))
        write_whole(temporary / OPTIMIZER, partial(save_file, optimizer_tensors(optimizer, trained)))
        if averaged := average.tensors():
            write_whole(temporary / AVERAGE, partial(save_file, averaged))
        with average.acting():
            save_adapter(pipe, temporary / ADAPTER)  # for people: nothing here reads it
        files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir()) if path.is_file()}
        write_json(temporary / MANIFEST, {"step": step, "files": files})
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{final} cannot be written ({error}): make room, and continue with --resume latest") from error
    if final.exists():  # one that was not whole
        shutil.rmtree(final)
    os.rename(temporary, final)
    sync(root)
    return final


def load_checkpoint(
    path: Path, trained: Mapping[str, nn.Parameter], *, averaged: bool = False
) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint by file: `TRAINED`, `AVERAGE` by parameter, `OPTIMIZER` as `optimizer_tensors` does.

    Args:
        averaged: Whether it has an `AVERAGE`.
    Raises:
        ValueError: a file is damaged, or of a model with other trained tensors.
    """
    try:
        files = {name: load_file(path / name) for name in (TRAINED, OPTIMIZER, *([AVERAGE] if averaged else []))}
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is of an earlier version of lineardit: continue with that one, or train again"
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
    """What AdamW remembers of each parameter, such as {"NAME.exp_avg": tensor}."""
    return {
        f"{name}.{key}": value.contiguous()
        for name, parameter in trained.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def remember_(optimizer: Optimizer, trained: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Give AdamW what `optimizer_tensors` took from it."""
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition(".")
        optimizer.state[trained[parameter]][key] = tensor


def latest_checkpoint(root: Path) -> tuple[Path, int] | None:
    """Folder and step of the newest whole checkpoint; incomplete ones are passed over."""
    whole = whole_checkpoints(root)
    return (whole[max(whole)], max(whole)) if whole else None


def whole_checkpoints(root: Path) -> dict[int, Path]:
    """Those that a run can go on after, by their step."""
    return {_step(path): path for path in _checkpoints(root) if _is_whole(path)}


def step_to_resume(root: Path, resume: Resume) -> int:
    """The step after which a run goes on; 0 where `"latest"` finds no whole checkpoint.

    Raises:
        ValueError: there is no whole checkpoint of this step.
    """
    whole = whole_checkpoints(root)
    if resume == "latest":
        return max(whole, default=0)
    if resume not in whole:
        there = ", ".join(map(str, whole)) or "none"
        raise ValueError(f"--resume must be latest or the step of a whole checkpoint in {root} ({there}), got {resume}")
    return resume


def remove_later(root: Path, step: int) -> None:
    """Remove checkpoints of later steps than this, after which a run goes on: what follows is another way.

    They are told; where the newest is taken, they are not whole.
    """
    for path in _checkpoints(root):
        if _step(path) > step:
            why = f"the run continues after step {step}" if _is_whole(path) else "it is incomplete"
            logger.warning("%s is removed: %s", path, why)
            _remove(path)


def prune_checkpoints(root: Path, keep_last: int) -> None:
    """Remove all but the newest whole ones, and what an interrupted write left."""
    whole = [path for path in _checkpoints(root) if _is_whole(path)]
    for path in _checkpoints(root):
        if path not in whole[-keep_last:]:
            _remove(path)
    for path in root.glob(".step-*.tmp"):
        shutil.rmtree(path)


def _remove(path: Path) -> None:
    (path / MANIFEST).unlink(missing_ok=True)  # no reader takes it from here on
    shutil.rmtree(path)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _checkpoints(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step-*") if path.is_dir() and re.fullmatch(r"step-\d{8,}", path.name))


def _is_whole(path: Path) -> bool:
    manifest = path / MANIFEST
    if not manifest.is_file():
        return False
    try:
        files = dict(json.loads(manifest.read_text())["files"])
    except (ValueError, KeyError, TypeError):
        return False
    return all((path / name).is_file() and (path / name).stat().st_size == size for name, size in files.items())
