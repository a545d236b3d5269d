"""Swap a model's self-attention for attention of linear cost, and back."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn

from ..kernels.pieces.table_cache import release_tables
from .adapters.config_entry import remove_entry_, write_entry_
from .advice import warn_unconverted_networks, warn_untested
from .errors import UnsupportedModelError, did_you_mean
from .families import Family, family_of
from .matching import attention_modules, check_text, choose, head_shape, levels_below
from .methods import METHODS, RECOMMENDED, config_to_dict
from .methods.field_checks import check_count
from .networks import denoiser, networks
from .report import SwapReport
from .seam.conversion import Conversion, conversion_of, warn_unused_dense_below
from .seam.group_offload import regroup_offload_
from .seam.hooks import Level, install
from .seam.input_terms import InputTerms, check_inputs
from .seam.intercept import LinearAttention, change_class, check_forward, linear_class
from .weights.overlays import refuse_fused

logger = logging.getLogger(__name__)

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel", "DeepSpeedEngine")


def linearize_(
    pipe_or_model: Any,
    config: Any = RECOMMENDED,
    *,
    layers: str | Sequence[str] | None = None,
    min_tokens: int = 0,
    dense_below: int = 0,
    impl: str = "auto",
    family: Family | None = None,
) -> SwapReport:
    """Swap a model's self-attention in place; a converted model is converted again and keeps its trained weights.

    Args:
        pipe_or_model: A pipeline (its `transformer` or `unet` is converted) or such a model.
        config: Config of a method, such as `Clear(radius=16)`, or {glob of module names: config}. Default: the hybrid
            that docs/methods.md recommends.
        layers: Globs of module names to restrict the swap to; None: every self-attention module of the image.
        min_tokens: Keep full attention in the levels of a UNet that have fewer image tokens at its native size, where
            it is cheap.
        dense_below: Run the model's own attention in calls with fewer image tokens than this; in a UNet, level by
            level. Applies with `impl` "auto", and only while nothing has been trained for the new attention.
        impl: The implementation; "auto" picks one, and runs the original call where the method covers everything.
        family: How to convert a model of your own; None: its previous family, or the one of the model's class.
    Raises:
        UnsupportedModelError: the model's class is unknown, it is sharded, or a hook of another tool interferes.
        ValueError: a pattern matches nothing or the same layer as another, a config or `impl` is unknown, or
            `dense_below` is not an integer >= 0.
    """
    _, model = denoiser(pipe_or_model)
    _refuse_sharded(model, "linearize_")
    check_count("dense_below", dense_below, least=0)
    if not isinstance(family, Family | None):
        raise ValueError(f"family must be a lineardit.linearize.Family or None, got {family!r}")
    family = family or family_of(model)
    warn_untested()
    patterns = dict(config) if isinstance(config, Mapping) else {"*": config}
    for one in patterns.values():
        config_to_dict(one)  # raises if it is not a config
    candidates, skipped = attention_modules(model, family)
    below_min_tokens = levels_below(model, family, list(candidates), min_tokens)
    skipped |= below_min_tokens
    candidates = {name: module for name, module in candidates.items() if name not in below_min_tokens}
    configs = choose(list(candidates), patterns, [layers] if isinstance(layers, str) else layers)
    check_convertible(model, family, configs, impl)

    previous = _remove_seam(model)
    conversion = Conversion(family, patterns if layers is None and not below_min_tokens else configs, dense_below)
    if previous is not None:
        conversion.overlays = previous.overlays
    kernels = {name: _kernel(candidates[name], one, impl) for name, one in configs.items()}
    swap_(model, conversion, {name: candidates[name] for name in configs}, kernels)
    regroup_offload_(model)
    write_entry_(model)
    if conversion.overlays.items:
        logger.warning("weights trained for the previous conversion are kept: call restore_ first to start over")
        warn_unused_dense_below(model)
    skipped |= {name: f"not matched by {layers or list(patterns)!r}" for name in candidates if name not in configs}
    report = SwapReport(
        swapped=configs, skipped=skipped, family=family.name, impl=impl, dense_below=conversion.dense_tokens
    )
    logger.info("%s", report)
    warn_unconverted_networks(pipe_or_model, model)
    return report


def check_convertible(model: nn.Module, family: Family, configs: Mapping[str, Any], impl: str) -> None:
    """Raise like `linearize_` if these modules cannot get these methods; changes nothing."""
    _refuse_sharded(model, "linearize_")
    if not configs:
        raise ValueError("nothing to convert: the mapping of patterns to methods is empty")
    if any(METHODS[type(one)].input_terms for one in configs.values()):
        refuse_fused(model)
    candidates, _ = attention_modules(model, family)
    for name, one in configs.items():
        check_impl(impl, type(one))
        check_forward(name, candidates[name])
        check_text(name, family, one)
        check_inputs(name, candidates[name], one)
    _check_unmodified(model)


def restore_(pipe_or_model: Any) -> None:
    """Undo `linearize_` and remove trained weights: the model equals its base again, bit for bit.

    Args:
        pipe_or_model: A pipeline, with all of its converted networks (ControlNets as well), or one model.
    Raises:
        ValueError: nothing is converted.
        UnsupportedModelError: a model has been sharded or wrapped since; nothing is changed.
    """
    _refuse_sharded(denoiser(pipe_or_model)[1], "restore_")
    conversions = converted_networks(pipe_or_model)
    for model in conversions:
        _refuse_sharded(model, "restore_")
        _check_unmodified(model)
    for model, conversion in conversions.items():
        conversion.overlays.remove()
        _remove_seam(model)
        remove_entry_(model)
    release_tables()


@contextmanager
def dense(pipe_or_model: Any) -> Iterator[None]:
    """Context manager in which the model equals its base, without trained weights, for the thread that enters it.

    Args:
        pipe_or_model: A pipeline, with all of its converted networks, or one model.
    Raises:
        ValueError: nothing is converted.
        RuntimeError: another thread is inside the model, or inside `dense` of it.
    """
    with ExitStack() as undo:
        for conversion in converted_networks(pipe_or_model).values():
            conversion.refuse_other_threads()
            if not conversion.enabled:
                continue
            conversion.overlays.check_reversible()
            undo.callback(conversion.overlays.resume)  # undoes an interrupted `suspend` as well
            conversion.overlays.suspend()
            conversion.disable()
            undo.callback(conversion.enable)
        yield


def check_dense(pipe_or_model: Any) -> None:
    """Raise the ValueError of `dense` if nothing is converted or the base cannot be restored; changes nothing."""
    for conversion in converted_networks(pipe_or_model).values():
        if conversion.enabled:
            conversion.overlays.check_reversible()


def set_impl_(pipe_or_model: Any, impl: str) -> None:
    """Choose the implementation that converted modules run; it is not saved with the model.

    Raises:
        ValueError: nothing is converted, or a method has no such implementation (the error lists those it has).
    """
    modules = [module for model in converted_networks(pipe_or_model) for module in swapped(model).values()]
    kernels = [cast(Any, module).linear_kernel for module in modules]
    for kernel in kernels:
        check_impl(impl, type(kernel.config))
    for kernel in kernels:
        kernel.impl = impl


def swapped(model: nn.Module) -> dict[str, nn.Module]:
    """The converted attention modules of a model, by name."""
    return {name: module for name, module in model.named_modules() if issubclass(type(module), LinearAttention)}


def check_impl(impl: str, config_class: type) -> None:
    """Raise a ValueError if a method has no implementation of this name."""
    names = METHODS[config_class].implementations()
    if impl not in names:
        raise ValueError(
            f"{config_class.__name__} has no impl {impl!r}{did_you_mean(impl, names)}; choose from: {', '.join(names)}"
        )


def converted_networks(pipe_or_model: Any) -> dict[nn.Module, Conversion]:
    """The converted networks of a pipeline, or the converted model itself.

    Raises:
        ValueError: nothing is converted.
    """
    conversions = {model: conversion_of(model) for _, model in networks(pipe_or_model)}
    converted = {model: conversion for model, conversion in conversions.items() if conversion is not None}
    if not converted:
        inside = any(conversion_of(part) is not None for model in conversions for part in model.modules())
        hint = "pass the converted model that it wraps" if inside else "call linearize_ first"
        raise ValueError(f"this {type(pipe_or_model).__name__} is not converted: {hint}")
    return converted


def _kernel(attention: Any, config: Any, impl: str) -> Any:
    num_heads, head_dim = head_shape(attention)
    with torch.inference_mode(False):  # its parameters stay trainable if linearize_ runs in inference mode
        kernel = METHODS[type(config)](config, num_heads=num_heads, head_dim=head_dim)
    kernel.impl = impl
    return kernel


@torch.inference_mode(False)
def swap_(
    model: nn.Module, conversion: Conversion, modules: Mapping[str, nn.Module], kernels: Mapping[str, Any]
) -> None:
    """Give attention modules their kernels and class, and the model its hooks.

    Args:
        conversion: New, not shared with another model.
        modules: Attention modules by name, checked by `check_convertible`.
        kernels: A `Method` for each, by the same names.
    """
    layout_at = conversion.family.layout_at
    levels: dict[nn.Module, Level] = {}
    for name, module in modules.items():
        owner = model if layout_at is None else _ancestor(model, name, layout_at)
        level = levels.setdefault(owner, Level(conversion))
        attention, kernel = cast(Any, module), kernels[name]
        device = next(module.parameters()).device
        # kernels have real weights even in a model on meta: they are saved with the adapter
        attention.linear_kernel = kernel.to("cpu" if device.type == "meta" else device).train(module.training)
        attention._lineardit_level, attention._lineardit_name = level, name
        if kernel.input_terms:
            conversion.input_terms.append(InputTerms(attention, kernel, level))
        level.kernels.append(kernel)
        change_class(module, linear_class(cast(Any, type(module))))
    install(model, conversion, levels)


def _ancestor(model: nn.Module, name: str, class_name: str) -> nn.Module:
    """The nearest module above `name` of this class."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = model.get_submodule(".".join(parts[:length]))
        if type(module).__name__ == class_name:
            return module
    raise UnsupportedModelError(f"{name} is not inside a {class_name}, so its token grid is unknown")


def _check_unmodified(model: nn.Module) -> None:
    """Raise an UnsupportedModelError if a converted module is no longer as `linearize_` left it."""
    for name, module in swapped(model).items():
        check_forward(name, module)
        dense_class = cast(Any, module)._dense_class
        if type(module) is not linear_class(dense_class):
            raise UnsupportedModelError(
                f"{name} became a {type(module).__name__} after linearize_ (wrapped or sharded): undo that first"
            )


def _remove_seam(model: nn.Module) -> Conversion | None:
    """Restore classes and remove hooks; returns the old conversion, whose overlays a new one keeps."""
    conversion = conversion_of(model)
    if conversion is None:
        return None
    for module in swapped(model).values():
        change_class(module, cast(Any, module)._dense_class)
        del module.linear_kernel, module._lineardit_name
    for terms in conversion.input_terms:
        terms.remove()
    for handle in conversion.handles:
        handle.remove()
    for module in model.modules():
        vars(module).pop("_lineardit_level", None)
    del vars(model)["_lineardit_conversion"]
    return conversion


def _refuse_sharded(model: nn.Module, action: str) -> None:
    """Raise if the model is sharded: kernel weights made after sharding would silently differ between ranks."""
    sharded = [type(model).__name__] if type(model).__name__ in _WRAPPERS else []
    sharded += [f"{name or 'the model'} (FSDP)" for name, part in model.named_modules() if _is_fsdp(part)]
    sharded += [name for name, weight in model.named_parameters() if hasattr(weight, "ds_id") or _is_dtensor(weight)]
    if sharded:
        raise UnsupportedModelError(
            f"{action} must come before the model is wrapped or sharded, found {sharded[0]}: linearize_, add LoRA, "
            "freeze and cast, and only then DDP, FSDP or DeepSpeed"
        )


def _is_fsdp(module: nn.Module) -> bool:
    return any(cls.__name__ in ("FSDPModule", "FullyShardedDataParallel") for cls in type(module).__mro__)


def _is_dtensor(weight: torch.Tensor) -> bool:
    return type(weight).__name__ == "DTensor" or type(weight.data).__name__ == "DTensor"
