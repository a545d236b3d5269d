"""The student inside the teacher: one copy of the frozen weights, and beside it what training changes.

The student is the model as it stands; the teacher is the same model under `teacher(model)`: original attention, no
LoRA, and where the projections themselves are trained, their frozen twins.
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
from ..linearize.seam.conversion import put_on
from ..linearize.weights.quantized import is_quantized
from ..linearize.weights.training import add_lora_, projection_names
from .config import DistillConfig, Lora
from .start import start_

KERNEL = ".linear_kernel."


def build_student_(pipe: Any, config: DistillConfig) -> SwapReport:
    """Convert the pipeline's model, add what is trained, with the values to start from, freeze the rest.

    Raises:
        ValueError: the model cannot be converted so, a projection to train is not there, or the adapter to start from
            does not fit.
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
    start_(model, config)
    return report


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer changes and a checkpoint holds."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def teacher(model: nn.Module) -> Iterator[None]:
    """Make `model` the original for a while, without gradients.

    Never open it between the student's forward and its backward: gradient checkpointing would run the teacher again.
    """
    with dense(model), torch.no_grad():
        yield


class TwinLinear(nn.Linear):
    """A linear layer that also holds the weights it started from, and computes with one or the other.

    The twin lives in the same module, and moves with it.
    """

    twin_active: bool
    teacher_weight: nn.Parameter
    teacher_bias: nn.Parameter | None

    def forward(self, input: Tensor) -> Tensor:
        if self.twin_active:
            return F.linear(input, self.teacher_weight, self.teacher_bias)
        return super().forward(input)


def add_twins_(model: nn.Module, projections: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Give these projections of every swapped attention module a frozen twin; the weights themselves may then train.

    Returns:
        {parameter name: parameter} of the weights and biases to train.
    Raises:
        ValueError: no swapped module has one of the names, or it is not a plain nn.Linear (quantized, wrapped).
    """
    found = {name: model.get_submodule(name) for name in projection_names(model, projections)}
    for name, module in found.items():
        if type(module) is not nn.Linear or is_quantized(module.weight):
            raise ValueError(f"{name} must be an nn.Linear to be trained, got a {_kind(module)}; train a lora")
    twins = Twins({name: _add_twin_(cast(nn.Linear, module)) for name, module in found.items()})
    put_on(model, twins)
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
    """The overlay of `add_twins_`: what `dense`, `restore_` and `save_adapter` ask of trained weights."""

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
        """A twin always leads back."""

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
        """Names of the base's parameters that hold other numbers now."""
        return list(self.parameters())

    def tensors(self) -> dict[str, Tensor]:
        """The trained weights in the base's dtype, under the base's names."""
        dtypes = {name: layer.teacher_weight.dtype for name, layer in self.layers.items()}
        return {name: one.detach().to(dtypes[name.rpartition(".")[0]]) for name, one in self.parameters().items()}

    def describe(self) -> Trained:
        return Trained(kind="full")
