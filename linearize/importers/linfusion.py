"""Checkpoints of LinFusion (arXiv:2409.02097, github.com/Huage001/LinFusion) for UNets of Stable Diffusion.

A folder in diffusers' format. `modules_list` in its config.json says which attention module, heads and hidden channels
(`projection_mid_dim`: null as many as the input, -1 no networks) belong to number i; the tensors of module i are its
projections `i.to_q`, `i.to_k`, `i.to_v`, `i.to_out.0` and the networks f_q and f_k, `i.to_q_` and `i.to_k_`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapters.base import read_json
from ..adapters.config_entry import write_entry_
from ..adapters.fitting import check_shapes, shapes_of, shorten_list
from ..adapters.grouping import grouped
from ..adapters.place import CONFIG_FILE, Place, find_place
from ..convert import linearize_, restore_, swapped
from ..errors import UnsupportedModelError
from ..families import family_of
from ..folders import read_tensors
from ..matching import attention_modules, head_shape
from ..methods.linfusion import LinFusion, LinFusionAttention
from ..networks import denoiser
from ..report import SwapReport
from ..weights.full_weights import check_writable, replace_weights_
from ..weights.overlays import check_unmerged, plain_layer, refuse_fused

_MODEL_CLASS = "UNet2DConditionModel"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_PICKLE = "diffusion_pytorch_model.bin"
_NETWORKS = {"to_q_": "query_term", "to_k_": "key_term"}  # the checkpoint's name -> ours


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One module of `modules_list`."""

    name: str
    channels: int
    heads: int
    config: LinFusion


def load_linfusion_checkpoint_(
    unet: Any,
    directory: str | Path,
    *,
    keep_original: bool = True,
    revision: str | None = None,
    offline: bool = False,
) -> SwapReport:
    """Convert a UNet to `LinFusion` in place and load a checkpoint published by LinFusion's authors.

    Args:
        unet: A UNet2DConditionModel (SD 1.5, 2.1, SDXL), or a pipeline of one; an earlier conversion is undone first.
        directory: The folder or Hub id, with config.json and diffusion_pytorch_model.safetensors, whole or in shards.
        keep_original: Keep the overwritten projections on the CPU, so that `restore_` and `dense` work.
        revision: Branch, tag or commit of a Hub id.
        offline: Do not access the network.
    Raises:
        UnsupportedModelError: the model has another class.
        ValueError: the folder is incomplete or damaged, or modules or tensors are missing, unexpected or of another
            shape (the error lists them); the model is unchanged.
    """
    _, model = denoiser(unet)
    if type(model).__name__ != _MODEL_CLASS:
        raise UnsupportedModelError(f"LinFusion's checkpoints are for a {_MODEL_CLASS}, got a {type(model).__name__}")
    place = find_place(directory, revision=revision, offline=offline)
    entries = _entries(place)
    tensors = _tensors(place)
    refuse_fused(model)
    _check_modules(entries, model, place.name)
    check_shapes(shapes_of(tensors), _expected(entries, model), what=f"the tensors of {place.name}")
    weights = _projections(entries, tensors)
    check_unmerged(model, weights)
    check_writable(model, weights)

    if swapped(model):
        restore_(model)
    configs = {entry.name: entry.config for entry in entries}
    candidates, _ = attention_modules(model, family_of(model))
    groups = grouped(configs, list(candidates))
    is_meta_model = next(model.parameters()).is_meta  # only then kernels take the checkpoint's dtype
    report = linearize_(model, {glob: configs[names[0]] for glob, names in groups.items()})
    for index, entry in enumerate(entries):
        kernel = cast(nn.Module, model.get_submodule(entry.name).linear_kernel)
        kernel.load_state_dict(_networks(index, tensors), assign=is_meta_model)
    replace_weights_(model, weights, keep_original=keep_original)
    write_entry_(model)
    return report


def _entries(place: Place) -> tuple[_Entry, ...]:
    """`modules_list`, checked."""
    file = place.file(CONFIG_FILE)
    modules = None if file is None else read_json(file).get("modules_list")
    if not isinstance(modules, list) or not modules:
        raise ValueError(
            f"{place.name} has no {CONFIG_FILE} with a modules_list: give the folder that LinFusion's authors published"
        )
    return tuple(_entry(module, f"modules_list[{index}] of {file}") for index, module in enumerate(modules))


def _entry(module: Any, where: str) -> _Entry:
    keys: dict[str, Any] = {"module_name": str, "dim_n": int, "heads": int, "projection_mid_dim": (int, type(None))}
    wrong = [
        key for key, kind in keys.items() if not isinstance(module, dict) or not isinstance(module.get(key, ...), kind)
    ]
    if wrong:
        raise ValueError(f"{where} needs {', '.join(keys)}; missing or of another type: {', '.join(wrong)}")
    hidden = 0 if module["projection_mid_dim"] == -1 else module["projection_mid_dim"]
    config = LinFusion(projection_channels=hidden)
    return _Entry(name=module["module_name"], channels=module["dim_n"], heads=module["heads"], config=config)


def _tensors(place: Place) -> dict[str, Tensor]:
    """All tensors, of one file or of several."""
    file, index = place.file(_WEIGHTS), place.file(f"{_WEIGHTS}.index.json")
    if file is not None:
        return read_tensors(file)
    if index is not None:
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        return {name: tensor for shard in shards for name, tensor in _shard(place, shard).items()}
    if place.file(_PICKLE) is not None:
        raise ValueError(
            f"{place.name} has its weights in {_PICKLE}, a pickle, which can run code and is not loaded: save them as "
            f"{_WEIGHTS} with safetensors.torch.save_file(torch.load({_PICKLE!r}, weights_only=True), {_WEIGHTS!r})"
        )
    raise ValueError(f"{place.name} has no {_WEIGHTS}: copy the missing file again")


def _shard(place: Place, name: str) -> dict[str, Tensor]:
    file = place.file(name)
    if file is None:
        raise ValueError(
            f"{place.name} is missing {name}, which {_WEIGHTS}.index.json refers to: copy the missing file again"
        )
    return read_tensors(file)


def _check_modules(entries: Sequence[_Entry], model: nn.Module, name: str) -> None:
    """Check that the UNet has these modules, with these channels and heads."""
    candidates, _ = attention_modules(model, family_of(model))
    problems = []
    for entry in entries:
        module: Any = candidates.get(entry.name)
        if module is None:
            problems.append(f"{entry.name} is not one of its self-attention modules")
            continue
        heads, head_dim = head_shape(module)
        if (heads * head_dim, heads) != (entry.channels, entry.heads):
            actual = f"{heads * head_dim} channels in {heads} heads"
            problems.append(f"{entry.name} has {actual}, not {entry.channels} in {entry.heads}")
    if len({entry.name for entry in entries}) < len(entries):
        problems.append("a module is named twice")
    if problems:
        raise ValueError(f"{name} was made for a different UNet: {shorten_list(problems)}")


def _expected(entries: Sequence[_Entry], model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint of this UNet."""
    expected: dict[str, tuple[int, ...]] = {}
    for index, entry in enumerate(entries):
        for projection in ("to_q", "to_k", "to_v", "to_out.0"):
            layer = plain_layer(model, f"{entry.name}.{projection}")
            for key, parameter in layer.named_parameters(recurse=False):
                expected[f"{index}.{projection}.{key}"] = tuple(parameter.shape)
        with torch.device("meta"):
            kernel = LinFusionAttention(entry.config, num_heads=entry.heads, head_dim=entry.channels // entry.heads)
        for theirs, ours in _NETWORKS.items():
            for key, shape in shapes_of(kernel.get_submodule(ours).state_dict()).items():
                expected[f"{index}.{theirs}.{key}"] = shape
    return expected


def _projections(entries: Sequence[_Entry], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that replace the UNet's own, by its names."""
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        index, _, rest = name.partition(".")
        if rest.partition(".")[0] not in _NETWORKS:
            weights[f"{entries[int(index)].name}.{rest}"] = tensor
    return weights


def _networks(index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of module `index`'s linear kernel."""
    return {
        f"{ours}.{name.removeprefix(prefix)}": tensor
        for theirs, ours in _NETWORKS.items()
        for name, tensor in tensors.items()
        if name.startswith(prefix := f"{index}.{theirs}.")
    }
