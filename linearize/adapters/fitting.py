"""Checks that an adapter fits a model and sorts its tensors, before the model is changed."""

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..families import Family
from ..matching import attention_modules, head_shape
from ..methods import METHODS
from ..weights.overlays import plain_layer
from .manifest import Manifest

MAX_LISTED = 5  # names in an error message


@dataclass(frozen=True, kw_only=True)
class AdapterTensors:
    """The tensors of an adapter, by purpose.

    Attributes:
        kernels: {attention module: {name in its linear kernel: tensor}}.
        lora: {Linear layer: (down [rank, in], up [out, rank])}.
        alpha: LoRA's alpha, 0 without LoRA.
        full: {parameter of the base: its new value}.
    """

    kernels: dict[str, dict[str, Tensor]]
    lora: dict[str, tuple[Tensor, Tensor]]
    alpha: float
    full: dict[str, Tensor]


def attention_shapes(modules: Iterable[nn.Module]) -> dict[str, int]:
    """Number of attention modules of each shape, {"24x128": 19} for heads x head_dim."""
    shapes = Counter(f"{heads}x{head_dim}" for heads, head_dim in map(head_shape, modules))
    return dict(sorted(shapes.items()))


def check_fit(manifest: Manifest, model: nn.Module, family: Family) -> None:
    """Check that a model has the class, layers and heads that an adapter was made for.

    Raises:
        ValueError: it does not; the error names the difference.
    """
    made_for = f"the adapter was made for {manifest.base or 'a model that was never saved'}"
    if type(model).__name__ != manifest.model_class:
        raise ValueError(
            f"{made_for}, a {manifest.model_class}; this model is a {type(model).__name__}: load it on such a model"
        )
    candidates, _ = attention_modules(model, family)
    for pattern, expected in manifest.attention.items():
        found = attention_shapes(candidates[name] for name in fnmatch.filter(candidates, pattern))
        if found != dict(expected):
            raise ValueError(
                f"{made_for}, whose {pattern} is {_shapes_text(expected)} (heads x head_dim); this model's is "
                f"{_shapes_text(found)}: load it on a model of that shape"
            )


def _shapes_text(shapes: Mapping[str, int]) -> str:
    return " + ".join(f"{count} of {shape}" for shape, count in shapes.items()) or "absent"


def sort_tensors(manifest: Manifest, tensors: Mapping[str, Tensor], model: nn.Module, family: Family) -> AdapterTensors:
    """Sort an adapter's tensors and compare their names and shapes with the model's.

    Raises:
        ValueError: some are missing, unknown or of another shape; the error lists them.
    """
    trained = {one.kind: one for one in manifest.trained}
    expected = _kernel_shapes(manifest, model, family)
    kernels: dict[str, dict[str, Tensor]] = {}
    lora: dict[str, dict[str, Tensor]] = {}
    full: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, key = name.partition(".linear_kernel.")
        layer, _, factor = name.removesuffix(".weight").rpartition(".")
        if key:
            kernels.setdefault(module, {})[key] = tensor
        elif factor in ("lora_A", "lora_B") and "lora" in trained:
            lora.setdefault(layer, {})[factor] = tensor
            expected |= _lora_shapes(layer, cast(int, trained["lora"].rank), model)
        elif "full" in trained:
            full[name] = tensor
            expected |= _parameter_shape(name, model)
    check_shapes(shapes_of(tensors), expected, what="the adapter's tensors")
    return AdapterTensors(
        kernels=kernels,
        lora={layer: (pair["lora_A"], pair["lora_B"]) for layer, pair in lora.items()},
        alpha=cast(float, trained["lora"].alpha) if "lora" in trained else 0,
        full=full,
    )


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], *, what: str) -> None:
    """Compare names and shapes.

    Raises:
        ValueError: they differ; the error lists what is missing, unknown or of another shape.
    """
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    reshaped = [
        f"{name} is {list(found[name])}, the model's is {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = {"missing": missing, "not in this model": unknown, "of another shape": reshaped}
    texts = [f"{len(names)} {problem}: {shorten_list(names)}" for problem, names in problems.items() if names]
    if texts:
        raise ValueError(f"{what} do not fit this model; {'; '.join(texts)}")


def shorten_list(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _kernel_shapes(manifest: Manifest, model: nn.Module, family: Family) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters of the linear kernels."""
    candidates, _ = attention_modules(model, family)
    expected: dict[str, tuple[int, ...]] = {}
    for pattern, config in manifest.configs().items():
        for name in fnmatch.filter(candidates, pattern):
            num_heads, head_dim = head_shape(candidates[name])
            with torch.device("meta"):
                kernel = METHODS[type(config)](config, num_heads=num_heads, head_dim=head_dim)
            expected |= {f"{name}.linear_kernel.{key}": shape for key, shape in shapes_of(kernel.state_dict()).items()}
    return expected


def _lora_shapes(layer: str, rank: int, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Linear layer's LoRA factors; empty if the model has no such layer."""
    linear = _layer(model, layer)
    if not hasattr(linear, "in_features"):
        return {}
    return {f"{layer}.lora_A.weight": (rank, linear.in_features), f"{layer}.lora_B.weight": (linear.out_features, rank)}


def _parameter_shape(name: str, model: nn.Module) -> dict[str, tuple[int, ...]]:
    layer, _, attribute = name.rpartition(".")
    parameter = getattr(_layer(model, layer), attribute, None)
    return {name: tuple(parameter.shape)} if isinstance(parameter, nn.Parameter) else {}


def _layer(model: nn.Module, name: str) -> Any:
    try:
        return plain_layer(model, name)
    except AttributeError:
        return None
