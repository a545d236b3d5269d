"""The parts of a pipeline on the meta device, without memory for their weights, for planning."""

from importlib import import_module
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import SchedulerMixin
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from torch import nn

from .base import Base, build_on_meta, cast_as_loaded_, read_json
from .place import CONFIG_FILE, PIPELINE_FILE, find_place


def parts_on_meta(base: Base, *, dtype: torch.dtype, offline: bool = False) -> dict[str, nn.Module | None]:
    """Every part of a pipeline that has weights, by name, on the meta device; reads only config files.

    A part without weights that a folder lacks, such as a tokenizer, is None; the scheduler must be there.

    Args:
        base: Of a pipeline, from `read_base`.
        dtype: Dtype of the weights; some stay float32, as in a loaded model.
        offline: Do not access the network.
    Raises:
        ValueError: parts have no config, or one that does not fit its class.
    """
    place = find_place(str(base.source.name), revision=base.source.revision, offline=offline)
    index_file = place.file(PIPELINE_FILE)
    assert index_file is not None  # it was read before
    kinds = {
        name: _class_of(*entry)
        for name, entry in read_json(index_file).items()
        if isinstance(entry, list) and entry[0] is not None
    }
    configs = {name: place.file(f"{name}/{file}") for name, kind in kinds.items() if (file := _config_name(kind))}
    if missing := [f"{name}/{_config_name(kinds[name])}" for name, file in configs.items() if file is None]:
        raise ValueError(
            f"{place.name} has a {PIPELINE_FILE} but no {', '.join(missing)}: the copy is incomplete; a plan needs "
            "these files, but no weights"
        )
    parts: dict[str, nn.Module | None] = {}
    for name, kind in kinds.items():
        config = configs.get(name)
        if name == base.component:
            model = build_on_meta(base, dtype=dtype)
            # diffusers records where a model was loaded from
            model.register_to_config(_name_or_path=str(cast(Path, config).parent))  # type: ignore[operator]
            parts[name] = model
        elif config is not None and issubclass(kind, nn.Module):
            parts[name] = _part_on_meta(kind, config, dtype)
        elif config is None and place.folder is not None and not (place.folder / name).exists():
            parts[name] = None
    return parts


def _class_of(library: str, name: str) -> Any:
    """A class that model_index.json names; None: neither library nor a pipeline module of diffusers has it."""
    if library in ("diffusers", "transformers"):
        return getattr(import_module(library), name, None)
    return getattr(getattr(diffusers.pipelines, library, None), name, None)


def _config_name(kind: Any) -> str | None:
    """Name of the config file of a part that has weights or is a scheduler; None for other parts."""
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        return CONFIG_FILE
    return SCHEDULER_CONFIG_NAME if isinstance(kind, type) and issubclass(kind, SchedulerMixin) else None


def _part_on_meta(kind: type[Any], config: Path, dtype: torch.dtype) -> nn.Module:
    try:
        if issubclass(kind, transformers.PreTrainedModel):
            return _transformers_part_on_meta(kind, config, dtype)
        with init_empty_weights(include_buffers=True):
            model: nn.Module = kind.from_config(read_json(config))
    except (TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"{config} does not fit a {kind.__name__}: {error}") from error
    cast_as_loaded_(model, dtype)
    return model


def _transformers_part_on_meta(kind: type[Any], config: Path, dtype: torch.dtype) -> nn.Module:
    """A text encoder on the meta device; weights that two layers share stay shared."""
    with torch.device("meta"):
        model: nn.Module = kind(kind.config_class.from_pretrained(config.parent)).to(dtype)
    keep_in_fp32 = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        keep_in_fp32 |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, weight in model.named_parameters():
        if keep_in_fp32.intersection(name.split(".")):
            weight.data = weight.data.to(torch.float32)
    return model
