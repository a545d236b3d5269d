"""Frozen weights in 8 or 4 bits: `[base.quantization]`, in the terms of diffusers' PipelineQuantizationConfig.

    quant_backend         quant_kwargs
    "bitsandbytes_4bit"   of diffusers' BitsAndBytesConfig; nf4, computed in `base.dtype`, where they say nothing else
    "bitsandbytes_8bit"   of the same
    "torchao"             `quant_type`, the name of a config of torchao.quantization, and what that takes

What is quantized are the Linear layers of the denoiser; a LoRA learns beside them (QLoRA, arXiv:2305.14314).
"""

import inspect
import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ..linearize.errors import nearest
from .config import BACKENDS, Base, Quantization

SETTING = "base.quantization"


def quantization_options(base: Base, component: str | None) -> dict[str, Any]:
    """Options of `load_base` that quantize the denoiser; none where nothing is said.

    Raises:
        ValueError: the backend's package is not here, it cannot run here, or an argument of it is none or wrong.
    """
    settings = base.quantization
    if settings is None:
        return {}
    package = BACKENDS[settings.quant_backend]
    if find_spec(package) is None:
        raise ValueError(f"{SETTING} asks for {package}, which is not installed: pip install {package}")
    if package == "bitsandbytes" and not torch.cuda.is_available():
        raise ValueError(
            f"{SETTING}: diffusers quantizes with bitsandbytes on a GPU alone; torchao does it on CPUs too"
        )
    try:
        config = _torchao(settings) if package == "torchao" else _bitsandbytes(settings, base.dtype)
    except (TypeError, AttributeError, AssertionError) as error:  # of their constructors
        raise ValueError(f"{SETTING}.quant_kwargs: {error}") from error
    return {"quantization_config": diffusers.PipelineQuantizationConfig(quant_mapping={str(component): config})}


def _bitsandbytes(settings: Quantization, dtype: str) -> Any:
    bits = settings.quant_backend.removeprefix("bitsandbytes_")
    usual: dict[str, Any] = {f"load_in_{bits}": True}
    if bits == "4bit":
        usual |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    given = usual | settings.quant_kwargs
    _check_names(given, diffusers.BitsAndBytesConfig)
    return diffusers.BitsAndBytesConfig(**given)


def _torchao(settings: Quantization) -> Any:
    from torchao import quantization

    kinds = [name for name in dir(quantization) if name.endswith("Config") and not name.startswith("AOBase")]
    given = dict(settings.quant_kwargs)
    kind, kept = given.pop("quant_type", None), given.pop("modules_to_not_convert", None)
    if kind not in kinds:
        known = ", ".join(kinds)
        raise ValueError(
            f"{SETTING}.quant_kwargs.quant_type must be one of {known}; got {kind!r}{nearest(kind, kinds)}"
        )
    config_class = getattr(quantization, kind)
    _check_names(given, config_class)
    usual = {name: one.default for name, one in inspect.signature(config_class).parameters.items()}
    dtypes = {name: getattr(torch, str(one)) for name, one in given.items() if isinstance(usual[name], torch.dtype)}
    return diffusers.TorchAoConfig(config_class(**given | dtypes), modules_to_not_convert=kept)


def _check_names(given: Mapping[str, Any], config_class: Any) -> None:
    """Some of these classes take names that they do not know, and leave them out."""
    known = [name for name in inspect.signature(config_class).parameters if name not in ("self", "kwargs")]
    for name in given:
        if name not in known:
            raise ValueError(
                f"unknown setting {SETTING}.quant_kwargs.{name}{nearest(name, known)}; a {config_class.__name__} takes "
                + ", ".join(known)
            )


def is_quantized(parameter: Tensor) -> bool:
    """Whether it is packed in fewer bits than its layer computes in; torchao's claim a floating dtype."""
    return not parameter.is_floating_point() or type(parameter) is not nn.Parameter


def stored_tensors(parameter: Tensor) -> list[Tensor]:
    """The plain tensors that a parameter keeps in memory: itself, or the parts of one of torchao's."""
    if not hasattr(parameter, "__tensor_flatten__"):
        return [parameter.detach()]
    names, _ = parameter.__tensor_flatten__()
    return [one for name in names for one in stored_tensors(getattr(parameter, name))]


def count_of(parameter: nn.Parameter) -> int:
    """How many numbers it stands for; bitsandbytes packs two into one."""
    packed: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else math.prod(packed.shape)


def check_gradients(model: nn.Module, dtype: torch.dtype) -> None:
    """Whether a gradient passes through quantized layers to what is trained before them; the first one is tried.

    As in a step: after a forward without gradients, for which bitsandbytes packs its layers anew on some CPUs.

    Raises:
        ValueError: it does not, as where activations are quantized as well.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and is_quantized(layer.weight):
            values = torch.ones(1, layer.in_features, dtype=dtype, device=layer.weight.device, requires_grad=True)
            with torch.no_grad():
                layer(values.detach())
            try:
                layer(values).sum().backward()
                passes = values.grad is not None and bool(values.grad.any())
            except RuntimeError:  # it has no backward
                passes = False
            if not passes:
                raise ValueError(
                    f"no gradient passes through {name}, whose weight is a {type(layer.weight).__name__}: take a kind "
                    f"of {SETTING} that quantizes weights only"
                )
            return
