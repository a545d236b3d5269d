"""The student inside the teacher: one copy of the frozen weights, plus the trained ones.

The model itself is the student; under `teacher(model)` it is the teacher: original attention, no LoRA, and where the
projections themselves are trained, their frozen twins.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..linearize.adapters.config_entry import write_entry_
from ..linearize.adapters.manifest import Trained
from ..linearize.convert import dense, linearize_
from ..linearize.networks import denoiser
from ..linearize.report import SwapReport
from ..linearize.seam.conversion import add_overlay
from ..linearize.weights.quantized import is_quantized
from ..linearize.weights.training import add_lora_, projection_names
from .config import DistillConfig, Lora
from .start import load_start_adapter_

KERNEL = ".linear_kernel."


def build_student_(pipe: Any, config: DistillConfig) -> SwapReport:
    """Convert the pipeline's model, add the trained weights with their initial values, and freeze the rest.

    Raises:
        ValueError: the model does not support the conversion, a projection to train does not exist, or the adapter to
            start from does not fit.
    """
    report = linearize_(pipe, config.method, min_tokens=config.run.min_tokens, impl=config.run.impl)
    _, model = denoiser(pipe)
    if isinstance(config.trained, Lora):
        lora = config.trained
        overlay = add_lora_(model, rank=lora.rank, alpha=lora.alpha, targets=lora.projections, dtype=torch.float32)
    else:
        overlay = add_twins_(model, config.trained.projections)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name in overlay or KERNEL in name:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
    load_start_adapter_(model, config)
    return report


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are optimized and held in checkpoints, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def teacher(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is the original, without gradients.

    Do not enter it between the student's forward and its backward: gradient checkpointing would recompute the teacher.
    """
    with dense(model), torch.no_grad():
        yield


class TwinLinear(nn.Linear):
    """A linear layer that also holds its original weights, and computes with one set or the other.

    Both are in the same module, so they move together.
    """

    twin_active: bool
    teacher_weight: nn.Parameter
    teacher_bias: nn.Parameter | None

    def forward(self, input: Tensor) -> Tensor:
        if self.twin_active:
            return F.linear(input, self.teacher_weight, self.teacher_bias)
        return super().forward(input)


def add_twins_(model: nn.Module, projections: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Give these projections of every swapped attention module a frozen twin, so that the weights themselves can train.

    Returns:
        {parameter name: parameter} of the weights and biases to train.
    Raises:
        ValueError: a name exists in no swapped module, or is not a plain nn.Linear (quantized, wrapped).
    """
    found = {name: model.get_submodule(name) for name in projection_names(model, projections)}
    for name, module in found.items():
        if type(module) is not nn.Linear or is_quantized(module.weight):
            raise ValueError(f"{name} must be an nn.Linear to be trained, got a {_kind(module)}; train a LoRA")
    twins = Twins({name: _add_twin_(cast(nn.Linear, module)) for name, module in found.items()})
    add_overlay(model, twins)
    write_entry_(model)
    return twins.parameters()


def _kind(module: nn.Module) -> str:
    name = type(module).__name__
    weight = getattr(module, "weight", None)
    return f"{name} with a {type(weight).__name__}" if weight is not None and is_quantized(weight) else name


def _add_twin_(layer: nn.Linear) -> TwinLinear:
    layer.__class__ = TwinLinear
    twin = cast(TwinLinear, layer)
    twin.twin_active = False
    twin.teacher_weight = nn.Parameter(twin.weight.detach().clone(), requires_grad=False)
    bias = None if twin.bias is None else nn.Parameter(twin.bias.detach().clone(), requires_grad=False)
    twin.register_parameter("teacher_bias", bias)
    return twin


class Twins:
    """The overlay of `add_twins_`: the interface to trained weights of `dense`, `restore_` and `save_adapter`."""

    reversible = True

    def __init__(self, layers: dict[str, TwinLinear]) -> None:
        self.layers = layers

    def off(self) -> None:
        for layer in self.layers.values():
            layer.twin_active = True

    def on(self) -> None:
        for layer in self.layers.values():
            layer.twin_active = False

    def check_reversible(self) -> None:
        """Never raises: the twin holds the original weights."""

    def remove(self) -> None:
        for layer in self.layers.values():
            layer.weight = layer.teacher_weight
            layer.register_parameter("bias", layer.teacher_bias)
            del layer.teacher_weight, layer.teacher_bias, layer.twin_active
            cast(nn.Linear, layer).__class__ = nn.Linear

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{key}": getattr(layer, key)
            for name, layer in self.layers.items()
            for key in ("weight", "bias")
            if getattr(layer, key) is not None
        }

    def changed(self) -> list[str]:
        """Names of the base's parameters whose values have changed."""
        return list(self.parameters())

    def tensors(self) -> dict[str, Tensor]:
        """The trained weights in the base's dtype, under the base's names."""
        dtypes = {name: layer.teacher_weight.dtype for name, layer in self.layers.items()}
        return {name: one.detach().to(dtypes[name.rpartition(".")[0]]) for name, one in self.parameters().items()}

    def describe(self) -> Trained:
        return Trained(kind="full")
