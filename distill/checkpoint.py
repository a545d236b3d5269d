"""Checkpoints that are whole or not there: written by all ranks into a hidden folder, synced, listed, renamed.

`step-00000100/` holds the trained tensors, the optimizer, the state of the random generators, and an adapter of the
student as it stands. The order of the data and the learning rate are functions of the step, so that the step's number
is their state.
"""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..linearize.adapter import save_adapter
from ..linearize.fitting import check_shapes, shapes_of
from ..linearize.folders import sync
from .student import trained_parameters

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
TRAINED = "trained.safetensors"
ADAPTER = "adapter"


def store_trained_only(accelerator: Accelerator) -> None:
    """Make save_state and load_state of this accelerator leave the frozen weights out."""

    def save(models: list[nn.Module], weights: list[dict[str, Any]], directory: str) -> None:
        (model,) = models
        weights.clear()
        if accelerator.is_main_process:
            trained = trained_parameters(accelerator.unwrap_model(model))
            save_file({name: one.detach().contiguous() for name, one in trained.items()}, Path(directory, TRAINED))

    def load(models: list[nn.Module], directory: str) -> None:
        model = accelerator.unwrap_model(models.pop())
        stored = load_file(Path(directory, TRAINED))
        check_shapes(shapes_of(stored), shapes_of(trained_parameters(model)), what=f"the tensors of {directory}")
        model.load_state_dict(stored, strict=False)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(accelerator: Accelerator, root: Path, step: int, pipe: Any) -> Path:
    """Write the checkpoint of a step, with the adapter of this pipeline; every rank calls it."""
    final, temporary = root / f"step-{step:08d}", root / f".step-{step:08d}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
    except (RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # of torch's own writer
            raise
        raise OSError(f"{final} cannot be written ({error}): make room, and go on with --resume latest") from error
    accelerator.wait_for_everyone()  # safetensors writes under a passing name: another rank must not meet it
    for path in temporary.iterdir():
        sync(path)
    accelerator.wait_for_everyone()  # the bytes of all ranks are down
    if accelerator.is_main_process:
        save_adapter(pipe, temporary / ADAPTER)  # for people: nothing here reads it
        files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir()) if path.is_file()}
        manifest = temporary / MANIFEST
        manifest.write_text(json.dumps({"step": step, "processes": accelerator.num_processes, "files": files}))
        sync(manifest)
        sync(temporary)
        if final.exists():  # one that was not whole
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync(root)
    accelerator.wait_for_everyone()
    return final


def latest_checkpoint(root: Path) -> tuple[Path, int] | None:
    """Folder and step of the newest whole checkpoint; incomplete ones are passed over."""
    whole = [path for path in _checkpoints(root) if _is_whole(path)]
    return (whole[-1], int(whole[-1].name.removeprefix("step-"))) if whole else None


def passed_over(root: Path, step: int) -> list[Path]:
    """Checkpoints of later steps than this, which are not whole."""
    return [path for path in _checkpoints(root) if int(path.name.removeprefix("step-")) > step]


def prune_checkpoints(root: Path, keep_last: int) -> None:
    """Remove all but the newest whole ones, and what an interrupted write left."""
    whole = [path for path in _checkpoints(root) if _is_whole(path)]
    for path in _checkpoints(root):
        if path not in whole[-keep_last:]:
            (path / MANIFEST).unlink(missing_ok=True)  # no reader takes it from here on
            shutil.rmtree(path)
    for path in root.glob(".step-*.tmp"):
        shutil.rmtree(path)


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
