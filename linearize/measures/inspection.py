"""What `lineardit inspect` shows: what a conversion does to each module of a model, and what a step then costs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..adapters.base import Base, build_on_meta
from ..adapters.resolve import resolve_name
from ..convert import check_impl
from ..families import family_of
from ..matching import attention_modules, choose
from ..methods import check_impl_known, config_to_dict
from ..report import is_swappable
from .flops import Step, StepFlops, count_steps


@dataclass(frozen=True, kw_only=True)
class Row:
    """One attention module.

    Attributes:
        module: Its name.
        swapped: Whether a linear kernel replaces its attention.
        reason: Why not, "" if swapped.
        method: Name of the method, "" if not swapped.
        settings: The method's settings.
        impl: The implementation that runs on this machine, by size where it differs; "" if not swapped.
    """

    module: str
    swapped: bool
    reason: str
    method: str
    settings: dict[str, Any]
    impl: str


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Every attention module of a model or adapter, and the operations of a step.

    Attributes:
        base: Hub id or folder of the model.
        model_class: Class of the denoiser.
        family: Name of the model's family.
        dense_below: Image tokens of a call below which swapped modules make their original call; 0: never.
        rows: One for each attention module, in the model's order.
        flops: One for each size that the model supports; empty for classes whose operations are not counted.
    """

    base: str
    model_class: str
    family: str
    dense_below: int
    rows: tuple[Row, ...]
    flops: tuple[StepFlops, ...]

    @property
    def num_swapped(self) -> int:
        """Number of modules with a linear kernel."""
        return sum(row.swapped for row in self.rows)

    @property
    def num_swappable(self) -> int:
        """Number of the image's self-attention modules, swapped or not."""
        return sum(row.swapped or is_swappable(row.reason) for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self) | {"flops": [asdict(step) | {"after": step.after} for step in self.flops]}


def inspect_base(
    base_or_adapter: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    offline: bool = False,
    impl: str = "auto",
) -> Inspection:
    """Inspect a base, an adapter or a saved converted pipeline; reads config files, never the base's weights.

    Args:
        base_or_adapter: Folder, config.json or Hub id.
        base: Base to read instead of the one that an adapter names.
        revision: Branch, tag or commit of a Hub id.
        offline: Do not access the network.
        impl: The implementation to ask about.
    Raises:
        UnsupportedModelError: the model's class cannot be converted.
        ValueError: something is missing, damaged or out of reach, `impl` is unknown, or `base` is given for something
            other than an adapter.
    """
    check_impl_known(impl)
    resolved = resolve_name(base_or_adapter, base=base, revision=revision, offline=offline)
    if resolved.conversion is None:
        return _inspect(resolved.base, {}, impl, 0)
    dense_below = resolved.conversion.dense_tokens if impl == "auto" else 0
    return _inspect(resolved.base, resolved.conversion.configs(), impl, dense_below)


def _inspect(base: Base, patterns: Mapping[str, Any], impl: str, dense_below: int) -> Inspection:
    for config in patterns.values():
        check_impl(impl, type(config))
    model = build_on_meta(base)
    family = family_of(model)
    candidates, skipped = attention_modules(model, family)
    configs = choose(list(candidates), patterns, None)
    steps = count_steps(model, vae_scale=base.vae_scale)
    skipped_modules = skipped | {name: "not converted" for name in candidates if name not in configs}
    rows = {name: _skipped_row(name, reason) for name, reason in skipped_modules.items()} | {
        name: _swapped_row(name, config, _impl_by_size(name, config, steps, impl, dense_below))
        for name, config in configs.items()
    }
    return Inspection(
        base=base.source.name or "memory",
        model_class=base.model_class,
        family=family.name,
        dense_below=dense_below,
        rows=tuple(rows[name] for name, _ in model.named_modules() if name in rows),
        flops=tuple(step.flops(configs, dense_below=dense_below) for step in steps),
    )


def _swapped_row(name: str, config: Any, impl: str) -> Row:
    entries = config_to_dict(config)
    method = entries.pop("method")
    return Row(module=name, swapped=True, reason="", method=method, settings=entries, impl=impl)


def _skipped_row(name: str, reason: str) -> Row:
    return Row(module=name, swapped=False, reason=reason, method="", settings={}, impl="")


def _impl_by_size(name: str, config: Any, steps: Sequence[Step], impl: str, dense_below: int) -> str:
    """The implementation at every size: "tiled", or "reference at 1K, tiled at 2K 4K 8K"; "auto" without sizes."""
    if impl != "auto" or not steps:
        return impl
    like = torch.empty(1, device="cuda", dtype=torch.bfloat16) if torch.cuda.is_available() else torch.empty(1)
    sizes: dict[str, list[str]] = {}
    for step in steps:
        sizes.setdefault(step.auto_impl(name, config, like, dense_below=dense_below), []).append(step.size)
    if len(sizes) == 1:
        return next(iter(sizes))
    return ", ".join(f"{chosen} at {' '.join(names)}" for chosen, names in sizes.items())
