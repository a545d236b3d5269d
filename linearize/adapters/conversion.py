"""From a base to a student on disk: what `lineardit convert` runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ..convert import linearize_
from ..errors import did_you_mean
from ..folders import check_output
from ..importers import load_clear_checkpoint_, load_linfusion_checkpoint_
from ..methods import METHODS
from ..methods.clear import Clear
from ..methods.linfusion import LinFusion
from ..report import SwapReport
from .adapter import (
    check_adapter_output,
    find_adapter,
    is_single_file,
    read_adapter,
    write_adapter,
    write_adapter_files,
)
from .base import build_on_meta, read_base
from .loading import load_base, load_converted
from .manifest import SINGLE_FILE_SUFFIX
from .merging import save_merged
from .resolve import resolve_name

IMPORTERS = ("clear:FILE", "linfusion:DIR")


def convert_base(
    base: str | Path,
    config: Any,
    *,
    output: str | Path,
    layers: str | Sequence[str] | None = None,
    min_tokens: int = 0,
    dense_below: int = 0,
    revision: str | None = None,
    offline: bool = False,
    overwrite: bool = False,
    importer: str | None = None,
) -> SwapReport:
    """Convert a model from its config files only and write an adapter, untrained or with published weights.

    Args:
        base: Folder, config.json or Hub id of a pipeline or denoiser in diffusers' format.
        config: Config of a method, such as `Clear(radius=16)`, or {glob of module names: config}; None: the importer's.
        output: The adapter folder to write, or one file if it ends in `.safetensors`.
        layers: Globs of module names to restrict the swap to.
        min_tokens: As in `linearize_`.
        dense_below: As in `linearize_`.
        revision: Branch, tag or commit of a Hub id.
        offline: Do not access the network.
        overwrite: Replace what is at `output`.
        importer: "clear:FILE" loads a checkpoint of CLEAR, trained for `config`; "linfusion:DIR" one of LinFusion.
    Raises:
        UnsupportedModelError: the base's class cannot be converted.
        ValueError: the base cannot be read, nothing matches, or the output exists; nothing is written.
    """
    check_adapter_output(Path(output), overwrite=overwrite)
    _check_together(config, importer, layers, min_tokens, dense_below)
    _refuse_adapter(base, revision=revision, offline=offline)
    found = read_base(base, revision=revision, offline=offline)
    model = build_on_meta(found)
    report = _convert_(model, config, importer, layers, min_tokens, dense_below, offline=offline)
    write_adapter(model, found.source, Path(output), overwrite=overwrite)
    return report


def repack_adapter(
    adapter: str | Path,
    *,
    output: str | Path,
    revision: str | None = None,
    offline: bool = False,
    overwrite: bool = False,
) -> Path:
    """Rewrite an adapter: a folder as one `.safetensors` file, or a file as a folder.

    Args:
        adapter: Folder, file or Hub id.
        output: The folder to write, or the file.
        revision: Branch, tag or commit of a Hub id.
        offline: Do not access the network.
        overwrite: Replace what is at `output`.
    Returns:
        The output.
    Raises:
        ValueError: the adapter is missing or damaged, or the output exists.
    """
    check_adapter_output(Path(output), overwrite=overwrite)
    manifest, tensors = read_adapter(adapter, revision=revision, offline=offline)
    return write_adapter_files(manifest, tensors, Path(output), overwrite=overwrite)


def convert_and_merge(
    adapter_or_base: str | Path,
    config: Any = None,
    *,
    output: str | Path,
    layers: str | Sequence[str] | None = None,
    min_tokens: int = 0,
    dense_below: int = 0,
    revision: str | None = None,
    offline: bool = False,
    overwrite: bool = False,
    importer: str | None = None,
    dtype: torch.dtype | Literal["auto"] | None = None,
) -> Path:
    """Load a student with the weights of its base and write the merged pipeline, as `save_merged` does.

    Args:
        adapter_or_base: An adapter if neither config nor importer is given, otherwise a base.
        config: As in `convert_base`.
        output: The folder to write.
        layers: As in `convert_base`.
        min_tokens: As in `convert_base`.
        dense_below: As in `linearize_`.
        revision: Branch, tag or commit of a Hub id.
        offline: Do not access the network.
        overwrite: Replace an existing folder.
        importer: As in `convert_base`.
        dtype: Dtype of the weights to write; None: float32; "auto": that in which each part of the base is stored.
    Returns:
        The folder.
    Raises:
        UnsupportedModelError: the base's class cannot be converted.
        ValueError: something cannot be read or does not match, or the output exists; nothing is written.
    """
    if is_single_file(Path(output)):
        raise ValueError(f"a merged pipeline is a folder, got the output {output}: omit {SINGLE_FILE_SUFFIX}")
    check_output(Path(output), overwrite=overwrite)
    load_dtype: torch.dtype | Literal["auto", "stored"] | None = "stored" if dtype == "auto" else dtype
    if config is None and importer is None:
        refuse_choices(layers, min_tokens, dense_below)
        resolved = resolve_name(adapter_or_base, revision=revision, offline=offline)
        pipe = load_converted(resolved, dtype=load_dtype, impl="auto", keep_original=False)
    else:
        _check_together(config, importer, layers, min_tokens, dense_below)
        _refuse_adapter(adapter_or_base, revision=revision, offline=offline)
        base = read_base(adapter_or_base, revision=revision, offline=offline)
        pipe = load_base(base, dtype=load_dtype, offline=offline)
        _convert_(pipe, config, importer, layers, min_tokens, dense_below, offline=offline)
    return save_merged(pipe, output, overwrite=overwrite)


def refuse_choices(layers: str | Sequence[str] | None, min_tokens: int, dense_below: int) -> None:
    """Raise a ValueError if layers or sizes are chosen for an adapter, which has its own."""
    if dense_below != 0:
        raise ValueError(f"dense_below of an adapter cannot be changed, got {dense_below=}: pass its base instead")
    if layers is not None or min_tokens > 0:
        raise ValueError(
            f"layers of an adapter cannot be changed, got {layers=} and {min_tokens=}: pass its base instead"
        )


def _refuse_adapter(base: str | Path, *, revision: str | None, offline: bool) -> None:
    if find_adapter(base, revision=revision, offline=offline) is not None:
        raise ValueError(f"{base} is an adapter, which already has a method: pass its base instead, or omit the method")


def _check_together(
    config: Any, importer: str | None, layers: str | Sequence[str] | None, min_tokens: int, dense_below: int
) -> None:
    """Raise a ValueError if method, importer and the choice of layers and sizes do not go together."""
    if importer is None:
        if config is None:
            names = ", ".join(cls.__name__.lower() for cls in METHODS)
            raise ValueError(f"a base needs a method (--method), one of {names}, or weights to import (--import)")
        return
    kind, _, path = importer.partition(":")
    if kind not in ("clear", "linfusion") or not path:
        near = did_you_mean(kind, ("clear", "linfusion"))
        raise ValueError(f"importer (--import) must be {' or '.join(IMPORTERS)}, got {importer!r}{near}")
    if layers is not None or min_tokens > 0:
        raise ValueError(
            f"an imported checkpoint converts every layer it names: omit layers and min_tokens, got {layers=} and "
            f"{min_tokens=}"
        )
    if dense_below != 0:
        raise ValueError(
            f"imported weights were trained for linear attention at every size: omit dense_below, got {dense_below=}"
        )
    if kind == "clear" and (not isinstance(config, Clear) or config.pool_tokens is not None):
        raise ValueError(f"CLEAR's checkpoints need method clear with its radius and pool_size, got {config}")
    if kind == "linfusion" and config not in (None, LinFusion()):
        raise ValueError(f"LinFusion's checkpoints include their own settings: omit the method, got {config}")


def _convert_(
    pipe_or_model: Any,
    config: Any,
    importer: str | None,
    layers: str | Sequence[str] | None,
    min_tokens: int,
    dense_below: int,
    *,
    offline: bool,
) -> SwapReport:
    """Swap and load imported weights in place; the originals are not kept."""
    if importer is None:
        return linearize_(pipe_or_model, config, layers=layers, min_tokens=min_tokens, dense_below=dense_below)
    kind, _, path = importer.partition(":")
    if kind == "linfusion":
        return load_linfusion_checkpoint_(pipe_or_model, path, keep_original=False, offline=offline)
    return load_clear_checkpoint_(
        pipe_or_model, path, radius=config.radius, pool_size=config.pool_size, keep_original=False
    )
