"""Adapters turn a base into its student: a folder of one JSON and one safetensors file, or a single file."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ... import __version__
from ..convert import check_convertible, converted_networks, linearize_, restore_, swapped
from ..families import Family, family_of
from ..folders import check_output, check_output_file, new_folder, read_shapes, read_tensors, sha256, write_atomically
from ..matching import attention_modules, choose
from ..methods import config_to_dict
from ..networks import denoiser
from ..report import SwapReport
from ..seam.conversion import add_overlay, overlays_of
from ..weights.full_weights import check_writable, replace_weights_
from ..weights.low_rank import FusedLowRank, LowRank, match_layer
from ..weights.overlays import check_unmerged, refuse_fused
from .base import Source, source_of
from .config_entry import write_entry_
from .fitting import attention_shapes, check_fit, sort_tensors
from .grouping import grouped
from .manifest import (
    MANIFEST_FILE,
    SINGLE_FILE_SUFFIX,
    TENSORS_FILE,
    Manifest,
    TensorsFile,
    Trained,
    read_manifest,
)
from .place import Place, find_place

logger = logging.getLogger(__name__)


def save_adapter(pipe_or_model: Any, directory: str | Path, *, overwrite: bool = False) -> Path:
    """Write what `linearize_` and training added to a base, without the base and without LoRA loaded by the user.

    The folder is written atomically. It holds `lineardit.json` and, if there are tensors, `lineardit.safetensors`: the
    kernels' parameters, LoRA factors under peft's names, changed tensors under the base's names. If `directory` ends in
    `.safetensors`, both go into that one file, with the JSON in its header.

    Args:
        pipe_or_model: A pipeline or denoiser after `linearize_`.
        directory: The folder to write, or the `.safetensors` file.
        overwrite: Replace existing output.
    Returns:
        The folder or file.
    Raises:
        ValueError: nothing is converted, the output exists, or a tensor is not in memory (sharded or offloaded).
    """
    _, model = denoiser(pipe_or_model)
    converted_networks(model)  # raises if nothing is converted
    _warn_of_user_lora(pipe_or_model, model)
    return write_adapter(model, source_of(pipe_or_model, model), Path(directory), overwrite=overwrite)


def _warn_of_user_lora(pipe_or_model: Any, model: nn.Module) -> None:
    """Warn about LoRA that the user loaded, which is not part of the student."""
    if getattr(pipe_or_model, "num_fused_loras", 0):
        logger.warning("LoRA fused into the base's weights is not saved in an adapter; save_merged keeps it")
    if any(hasattr(module, "get_base_layer") for module in model.modules()):
        logger.warning(
            "a loaded LoRA is not part of the student and is not saved in the adapter: load it again after the adapter"
        )


def load_adapter_(
    pipe_or_model: Any,
    directory_or_repo: str | Path,
    *,
    keep_original: bool = True,
    impl: str = "auto",
    revision: str | None = None,
    offline: bool = False,
    family: Family | None = None,
) -> SwapReport:
    """Convert a model in place as an adapter specifies, and load the adapter's trained weights.

    An earlier conversion is undone first. `restore_` and `dense` then give the base's output bit for bit. The adapter's
    LoRA is not a peft adapter of the model: `set_adapters` and `unload_lora_weights` do not affect it.

    Args:
        pipe_or_model: A pipeline or denoiser of the class and shape that the adapter was made for.
        directory_or_repo: The adapter's folder, `.safetensors` file or Hub id.
        keep_original: Keep a copy of the tensors that the adapter changes, on the CPU. False: fuse LoRA into the
            weights; `restore_` and `dense` then raise.
        impl: The implementation to run, as in `linearize_`.
        revision: Branch, tag or commit of the adapter's Hub id.
        offline: Do not access the network.
        family: How to convert a model of your own, as in `linearize_`.
    Raises:
        ValueError: the adapter is missing, damaged, or for another class, shape or number of layers; the model is
            unchanged.
    """
    manifest, tensors = read_adapter(directory_or_repo, revision=revision, offline=offline)
    return apply_adapter_(pipe_or_model, manifest, tensors, keep_original=keep_original, impl=impl, family=family)


def read_adapter(
    directory_or_repo: str | Path, *, revision: str | None = None, offline: bool = False, weights: bool = True
) -> tuple[Manifest, dict[str, Tensor]]:
    """The checked contents of an adapter: a folder, a single file or a Hub id.

    Args:
        weights: False: read only the shapes of trained base weights, from the header of their file.
    Raises:
        ValueError: it is missing, damaged, mixed from two adapters, or of a newer format.
    """
    place = find_place(directory_or_repo, revision=revision, offline=offline)
    file = adapter_file(place)
    if file is None:
        raise ValueError(
            f"{place.name} has no {MANIFEST_FILE}: it is not an adapter"
            + (" (or, offline, not in the local cache)" if place.offline else "")
            + "; create one with save_adapter or `lineardit convert`"
        )
    manifest = read_manifest(file)
    return manifest, adapter_tensors(place, manifest, weights=weights)


def find_adapter(name: str | Path, *, revision: str | None = None, offline: bool = False) -> Path | None:
    """`adapter_file` of a folder, file or Hub id."""
    return adapter_file(find_place(name, revision=revision, offline=offline))


def adapter_file(place: Place) -> Path | None:
    """The file that describes an adapter: its `lineardit.json`, or the single file itself; None: not an adapter."""
    if place.folder is not None and is_single_file(place.folder):
        return place.folder
    return place.file(MANIFEST_FILE)


def is_single_file(path: Path) -> bool:
    """Whether an adapter of this name is one file."""
    return path.suffix == SINGLE_FILE_SUFFIX


def check_adapter_output(path: Path, *, overwrite: bool) -> None:
    """Check that an adapter may be written to `path`.

    Raises:
        ValueError: `path` exists and overwrite is False, or it is a folder where a file is due, or the reverse.
    """
    if is_single_file(path):
        check_output_file(path, overwrite=overwrite)
    else:
        check_output(path, overwrite=overwrite)


def adapter_tensors(place: Place, manifest: Manifest, *, weights: bool = True) -> dict[str, Tensor]:
    """The checked tensors of an adapter whose manifest has been read; arguments and errors as of `read_adapter`."""
    if place.folder is not None and is_single_file(place.folder):
        return _tensors_of(place.folder, weights)
    return {} if manifest.tensors is None else _checked_tensors(place, manifest.tensors, weights)


def _tensors_of(file: Path, weights: bool) -> dict[str, Tensor]:
    if weights:
        return read_tensors(file)
    return read_shapes(file) | read_tensors(file, only=lambda name: ".linear_kernel." in name)


def _checked_tensors(place: Place, expected: TensorsFile, weights: bool) -> dict[str, Tensor]:
    file = place.file(expected.file)
    if file is None:
        raise ValueError(f"{place.name} is missing {expected.file}, which its {MANIFEST_FILE} refers to: copy it again")
    size = file.stat().st_size
    if size != expected.bytes:
        raise ValueError(
            f"{file} has {size} bytes, but {MANIFEST_FILE} says {expected.bytes}: it is truncated or from another "
            "adapter; copy both files again"
        )
    if weights and sha256(file) != expected.sha256:
        raise ValueError(f"{file} does not match {MANIFEST_FILE} (sha256 differs): copy both files again")
    return _tensors_of(file, weights)


def apply_adapter_(
    pipe_or_model: Any,
    manifest: Manifest,
    tensors: dict[str, Tensor],
    *,
    keep_original: bool,
    impl: str,
    family: Family | None = None,
) -> SwapReport:
    """`load_adapter_` for an adapter that has been read."""
    _, model = denoiser(pipe_or_model)
    family = family or family_of(model)
    configs = manifest.configs()
    if manifest.trained:
        refuse_fused(model)
    check_fit(manifest, model, family)
    parts = sort_tensors(manifest, tensors, model, family)
    check_unmerged(model, parts.full)
    check_writable(model, [*parts.full, *([] if keep_original else [f"{name}.weight" for name in parts.lora])])
    check_convertible(model, family, choose(list(attention_modules(model, family)[0]), configs, None), impl)
    _warn_of_other_base(manifest, source_of(pipe_or_model, model))
    if swapped(model):
        restore_(model)
    report = linearize_(model, configs, dense_below=manifest.dense_below, impl=impl, family=family)
    for name, module in swapped(model).items():
        cast(Any, module).linear_kernel.load_state_dict(parts.kernels.get(name, {}))
    if parts.full:
        replace_weights_(model, parts.full, keep_original=keep_original)
    if parts.lora:
        factors = {name: match_layer(model, name, pair) for name, pair in parts.lora.items()}
        overlay = LowRank if keep_original else FusedLowRank
        add_overlay(model, overlay(model, factors, alpha=parts.alpha))
    write_entry_(model)
    return replace(report, dense_below=manifest.dense_tokens)


def _warn_of_other_base(manifest: Manifest, source: Source) -> None:
    if None in (manifest.base, source.name):
        return
    if manifest.base != source.name:
        logger.info("the adapter was made for %s and is applied to %s", manifest.base, source.name)
    elif None not in (manifest.base_revision, source.revision) and manifest.base_revision != source.revision:
        logger.warning(
            "the adapter was made for revision %s of %s, but this pipeline is revision %s: if images look wrong, "
            "load that revision, or use lineardit.from_pretrained, which loads it",
            manifest.base_revision,
            manifest.base,
            source.revision,
        )


def write_adapter(model: nn.Module, source: Source, output: Path, *, overwrite: bool) -> Path:
    """`save_adapter` for a converted denoiser whose base is known."""
    return write_adapter_files(manifest_of(model, source), _tensors(model), output, overwrite=overwrite)


def write_adapter_files(manifest: Manifest, tensors: dict[str, Tensor], output: Path, *, overwrite: bool) -> Path:
    """Write an adapter, as a folder or as a single file."""
    if is_single_file(output):
        check_output_file(output, overwrite=overwrite)
        output.parent.mkdir(parents=True, exist_ok=True)
        header = replace(manifest, tensors=None).header()
        write_atomically(output, lambda temporary: save_file(tensors, temporary, metadata=header))
        return output
    with new_folder(output, overwrite=overwrite) as folder:
        file = None
        if tensors:
            path = folder / TENSORS_FILE
            save_file(tensors, path, metadata={"format": "pt"})
            file = TensorsFile(file=path.name, bytes=path.stat().st_size, sha256=sha256(path))
        (folder / MANIFEST_FILE).write_text(replace(manifest, tensors=file).to_json(), encoding="utf-8")
    return output


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {
        f"{name}.linear_kernel.{key}": tensor
        for name, module in swapped(model).items()
        for key, tensor in cast(nn.Module, module.linear_kernel).state_dict().items()
    }
    for overlay in overlays_of(model).items:
        tensors |= overlay.tensors()
    for name, tensor in tensors.items():
        if tensor.is_meta or type(tensor.data) is not Tensor:
            raise ValueError(f"{name} is not fully in memory (offloaded or sharded): gather it before save_adapter")
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def manifest_of(model: nn.Module, source: Source) -> Manifest:
    """The manifest of a converted denoiser, without its tensors file."""
    family = family_of(model)
    candidates, _ = attention_modules(model, family)
    configs = {name: cast(Any, module).linear_kernel.config for name, module in swapped(model).items()}
    groups = grouped(configs, list(candidates))
    return Manifest(
        base=source.name,
        base_revision=source.revision,
        base_license=source.license,
        pipeline_class=source.pipeline_class,
        model_class=type(model).__name__,
        family=family.name,
        attention={pattern: attention_shapes(candidates[name] for name in names) for pattern, names in groups.items()},
        methods={pattern: config_to_dict(configs[names[0]]) for pattern, names in groups.items()},
        dense_below=cast(Any, model)._lineardit_conversion.dense_below,
        trained=trained_on(model),
        versions={"lineardit": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__},
    )


def trained_on(model: nn.Module) -> tuple[Trained, ...]:
    """What was trained on the base's weights, each kind once."""
    return tuple(dict.fromkeys(overlay.describe() for overlay in overlays_of(model).items))
