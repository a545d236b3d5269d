"""From a base to an adapter folder, without the base's weights: what `lineardit convert` runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .adapter import write_adapter
from .base import build_on_meta, read_base
from .convert import linearize_
from .folders import check_output
from .importers import load_clear_checkpoint_
from .methods import nearest
from .methods.clear import Clear
from .report import SwapReport


def convert_base(
    base: str | Path,
    config: Any,
    *,
    output: str | Path,
    layers: str | Sequence[str] | None = None,
    revision: str | None = None,
    offline: bool = False,
    overwrite: bool = False,
    importer: str | None = None,
) -> SwapReport:
    """Converts a model by its config files alone and writes an adapter: untrained, or with published weights.

    Args:
        base: Folder, config.json or Hub id of a pipeline or denoiser in diffusers' format.
        config: Of a method, such as `Clear(radius=16)`; or {glob of module names: config}.
        output: The adapter folder to write.
        layers: Globs of module names to restrict the swap to.
        revision: Branch, tag or commit of a Hub id.
        offline: Never touch the network.
        overwrite: Replace an existing folder.
        importer: "clear:FILE" loads a checkpoint of CLEAR, trained for `config`.
    Raises:
        UnsupportedModelError: the base's class cannot be converted.
        ValueError: the base cannot be had, nothing matches, or the output exists; nothing is written.
    """
    check_output(Path(output), overwrite=overwrite)
    found = read_base(base, revision=revision, offline=offline)
    model = build_on_meta(found)
    if importer is None:
        report = linearize_(model, config, layers=layers)
    else:
        report = _import(model, config, importer, layers)
    write_adapter(model, found.source, Path(output), overwrite=overwrite)
    return report


def _import(model: nn.Module, config: Any, importer: str, layers: str | Sequence[str] | None) -> SwapReport:
    kind, _, file = importer.partition(":")
    if kind != "clear" or not file:
        raise ValueError(f"importer must be clear:FILE, got {importer!r}{nearest(kind, ['clear'])}")
    if not isinstance(config, Clear) or isinstance(config, Mapping) or config.pool_tokens is not None:
        raise ValueError(f"CLEAR's checkpoints need method clear with its radius and pool_size, got {config}")
    if layers is not None:
        raise ValueError(f"CLEAR's checkpoints are for all layers, got layers={layers!r}")
    return load_clear_checkpoint_(model, file, radius=config.radius, pool_size=config.pool_size)
