"""Starts a student from the adapter of another run, which `[start]` names."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..linearize.adapters.adapter import find_adapter, read_adapter
from ..linearize.adapters.fitting import AdapterTensors, check_fit, shorten_list, sort_tensors
from ..linearize.adapters.manifest import Manifest
from ..linearize.convert import swapped
from ..linearize.families import family_of
from ..linearize.folders import sha256
from ..linearize.matching import attention_modules, choose
from ..linearize.weights.low_rank import LORA_NAME
from .config import DistillConfig, Lora, Start

logger = logging.getLogger(__name__)


def with_adapter_defaults(tables: Mapping[str, Any], start: Start) -> Mapping[str, Any]:
    """The tables of a config, with the adapter's method and kind of weights as defaults.

    Raises:
        ValueError: the adapter is missing, damaged or unreachable, or has weights of both kinds.
    """
    if start.adapter is None:
        return tables
    manifest, _ = read_adapter(start.adapter, revision=start.revision, weights=False)
    theirs, ours = _trained_table(manifest, start), tables.get("trained", {})
    if isinstance(ours, dict) and ours.get("kind", theirs.get("kind")) == theirs.get("kind"):
        ours = theirs | ours
    return {"method": manifest.methods, **tables, "trained": ours}


def adapter_fingerprint(start: Start) -> str | None:
    """A digest of the adapter's content; None if there is no adapter."""
    if start.adapter is None:
        return None
    file = find_adapter(start.adapter, revision=start.revision)
    return None if file is None else sha256(file)[:16]  # if weights have a separate file, this one holds its sha256


def load_start_adapter_(model: nn.Module, config: DistillConfig) -> None:
    """Copy the adapter's weights into a student; a layer that the adapter did not train starts untrained.

    Raises:
        ValueError: the adapter is missing, damaged, of another model, method or kind of weights, or has trained a layer
            that this run does not train.
    """
    start = config.start
    if start.adapter is None:
        return
    manifest, tensors = read_adapter(start.adapter, revision=start.revision)
    family = family_of(model)
    check_fit(manifest, model, family)
    candidates = list(attention_modules(model, family)[0])
    _check_methods(start, choose(candidates, manifest.configs(), None), model)
    _check_trained(start, manifest, config)
    parts = sort_tensors(manifest, tensors, model, family)
    parameters, values = dict(model.named_parameters()), dict(_trained_weights(parts))
    if untrained := [name for name in values if name not in parameters or not parameters[name].requires_grad]:
        raise ValueError(
            f"start.adapter {start.adapter} has trained layers that trained.projections leaves out: "
            f"{shorten_list(untrained)}; leave trained.projections out, or add these layers"
        )
    for name, module in swapped(model).items():
        cast(Any, module).linear_kernel.load_state_dict(parts.kernels.get(name, {}))
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    loaded = len(values) + sum(map(len, parts.kernels.values()))
    trained = sum(parameter.requires_grad for parameter in parameters.values())
    logger.info("loaded from %s: %d of %d trained tensors", start.adapter, loaded, trained)


def _trained_weights(parts: AdapterTensors) -> Iterator[tuple[str, Tensor]]:
    """The trained weights and LoRA of the base's layers, under the student's parameter names."""
    yield from parts.full.items()
    for layer, (down, up) in parts.lora.items():
        yield f"{layer}.{LORA_NAME}.down", down
        yield f"{layer}.{LORA_NAME}.up", up


def _trained_table(manifest: Manifest, start: Start) -> dict[str, Any]:
    """The `[trained]` table of an adapter; empty if only kernels have weights."""
    if len(manifest.trained) > 1:
        raise ValueError(
            f"start.adapter {start.adapter} has both a LoRA and changed projections, but a run trains only one of "
            "them: start from an adapter with one"
        )
    for one in manifest.trained:
        return {"kind": "lora", "rank": one.rank, "alpha": one.alpha} if one.kind == "lora" else {"kind": "attention"}
    return {}


def _check_trained(start: Start, manifest: Manifest, config: DistillConfig) -> None:
    lora = config.trained
    ours: dict[str, Any] = {"kind": "attention"}
    if isinstance(lora, Lora):
        ours = {"kind": "lora", "rank": lora.rank, "alpha": lora.rank if lora.alpha is None else lora.alpha}
    theirs = _trained_table(manifest, start)
    for name, value in theirs.items():
        if ours.get(name) != value:
            raise ValueError(
                f"trained.{name} must be {value!r} as in start.adapter {start.adapter}, got {ours.get(name)!r}; leave "
                "it out to use the adapter's value"
            )


def _check_methods(start: Start, theirs: Mapping[str, Any], model: nn.Module) -> None:
    ours = {name: cast(Any, module).linear_kernel.config for name, module in swapped(model).items()}
    for name in {**theirs, **ours}:
        adapter_method, run_method = theirs.get(name, "full attention"), ours.get(name, "full attention")
        if adapter_method != run_method:
            raise ValueError(
                f"start.adapter {start.adapter} has {adapter_method} in {name}, but the settings have {run_method}: "
                "leave [method] and run.min_tokens out, or start from an adapter with that method"
            )
