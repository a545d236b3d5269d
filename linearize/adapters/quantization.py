"""Quantizes the weights of a base to 8 or 4 bits, with settings as in diffusers' PipelineQuantizationConfig.

    quant_backend         quant_kwargs
    "bitsandbytes_4bit"   arguments of diffusers' BitsAndBytesConfig; default: nf4, computed in the base's dtype
    "bitsandbytes_8bit"   arguments of the same
    "torchao"             `quant_type`, the name of a config of torchao.quantization (default: Int8WeightOnlyConfig),
                          and that config's arguments
    "layerwise_casting"   `storage_dtype`, float8_e4m3fn (default) or float8_e5m2: diffusers' own, which needs no other
                          package and casts the weights of each layer for its forward

The denoiser's Linear layers are quantized. Settings have it as `[base.quantization]`, the command line as
`--quantize BACKEND` or `--quantize BACKEND:NAME=VALUE,...`.
"""

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import diffusers
import torch
from torch import nn

from ..errors import did_you_mean
from ..families import FAMILIES
from .base import Base, build_on_meta

SETTING = "base.quantization (--quantize)"
CASTING = "layerwise_casting"
BACKENDS = {  # and their packages
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "torchao": "torchao",
    CASTING: "diffusers",
}
_SKIP_SETTINGS = ("modules_to_not_convert", "llm_int8_skip_modules")  # settings that name layers
_STORAGE_DTYPES = ("float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True, kw_only=True)
class Quantization:
    quant_backend: str
    quant_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.quant_backend not in BACKENDS:
            raise ValueError(
                f"{SETTING}: quant_backend must be {' or '.join(BACKENDS)}, got {self.quant_backend!r}"
                + did_you_mean(self.quant_backend, BACKENDS)
            )

    @property
    def bits(self) -> float | None:
        """Approximate bits of a weight with its scales; None: casting, which works on a model without weights too."""
        if self.quant_backend == CASTING:
            return None
        is_small = self.quant_backend == "bitsandbytes_4bit" or "4" in str(self.quant_kwargs.get("quant_type"))
        return 4.5 if is_small else 8

    def __str__(self) -> str:
        """As written on the command line."""
        arguments = ",".join(
            f"{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in self.quant_kwargs.items()
        )
        return f"{self.quant_backend}:{arguments}" if arguments else self.quant_backend


def quantization_options(quantization: Quantization, base: Base, dtype: torch.dtype) -> dict[str, Any]:
    """Options of diffusers' `from_pretrained` that quantize the denoiser.

    Raises:
        ValueError: the base is quantized already, the backend's package is not installed or cannot run here, or an
            argument is unknown or wrong.
    """
    if "quantization_config" in base.config:
        raise ValueError(f"{base.source.name} is already quantized according to its config: omit {SETTING}")
    if quantization.quant_backend == CASTING:
        _check_casting(quantization.quant_kwargs)
        return {}
    package = BACKENDS[quantization.quant_backend]
    if find_spec(package) is None:
        raise ValueError(f"{SETTING} needs {package}, which is not installed: pip install {package}")
    for name in _SKIP_SETTINGS:
        _check_skipped(name, quantization.quant_kwargs.get(name), base)
    if package == "bitsandbytes" and not torch.cuda.is_available():
        raise ValueError(f"{SETTING}: diffusers quantizes with bitsandbytes on GPUs only; torchao works on CPUs too")
    try:
        config = _torchao(quantization) if package == "torchao" else _bitsandbytes(quantization, dtype)
    except (TypeError, AttributeError, AssertionError) as error:  # from the constructors
        raise ValueError(f"{SETTING}: quant_kwargs: {error}") from error
    if base.component is not None:
        config = diffusers.PipelineQuantizationConfig(quant_mapping={base.component: config})
    return {"quantization_config": config}


def cast_layerwise_(model: Any, quantization: Quantization | None, dtype: torch.dtype) -> None:
    """Store a denoiser's weights in 8 bits and compute in `dtype`, if `quantization` is layerwise casting."""
    if quantization is not None and quantization.quant_backend == CASTING:
        _check_casting(quantization.quant_kwargs)
        storage_dtype = quantization.quant_kwargs.get("storage_dtype", _STORAGE_DTYPES[0])
        model.enable_layerwise_casting(storage_dtype=getattr(torch, storage_dtype), compute_dtype=dtype)


@contextmanager
def translate_quantization_errors(quantization: Quantization | None) -> Iterator[None]:
    """Context manager that turns a backend's error about a missing requirement into a ValueError.

    Raises:
        ValueError: the backend lacks something.
    """
    try:
        yield
    except (ImportError, AssertionError, NotImplementedError) as error:
        if quantization is None:
            raise
        raise ValueError(f"{SETTING} failed: {error}") from error


def _bitsandbytes(quantization: Quantization, dtype: torch.dtype) -> Any:
    bits = quantization.quant_backend.removeprefix("bitsandbytes_")
    defaults: dict[str, Any] = {f"load_in_{bits}": True}
    if bits == "4bit":
        defaults |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    given = defaults | quantization.quant_kwargs
    _check_names(given, diffusers.BitsAndBytesConfig)
    return diffusers.BitsAndBytesConfig(**given)


def _torchao(quantization: Quantization) -> Any:
    from torchao import quantization as library

    kinds = [name for name in dir(library) if name.endswith("Config") and not name.startswith("AOBase")]
    given = {"quant_type": "Int8WeightOnlyConfig"} | quantization.quant_kwargs
    kind, skipped = given.pop("quant_type"), given.pop("modules_to_not_convert", None)
    if kind not in kinds:
        known = ", ".join(kinds)
        raise ValueError(f"{SETTING}: quant_type must be one of {known}; got {kind!r}{did_you_mean(kind, kinds)}")
    config_class = getattr(library, kind)
    _check_names(given, config_class)
    defaults = {name: one.default for name, one in inspect.signature(config_class).parameters.items()}
    dtypes = {name: getattr(torch, str(one)) for name, one in given.items() if isinstance(defaults[name], torch.dtype)}
    return diffusers.TorchAoConfig(config_class(**given | dtypes), modules_to_not_convert=skipped)


def _check_casting(given: Mapping[str, Any]) -> None:
    for name in given:
        if name != "storage_dtype":
            raise ValueError(f"{SETTING}: unknown quant_kwargs {name}; {CASTING} takes storage_dtype")
    if given.get("storage_dtype", _STORAGE_DTYPES[0]) not in _STORAGE_DTYPES:
        raise ValueError(
            f"{SETTING}: storage_dtype must be {' or '.join(_STORAGE_DTYPES)}, got {given['storage_dtype']!r}"
        )


def _check_skipped(setting: str, given: Any, base: Base) -> None:
    """Raise a ValueError if a given name is not the end of the name of any Linear layer or of a module around one."""
    if given is None:
        return
    names = given if isinstance(given, list) else [given]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{SETTING}: {setting} must be module names, got {given!r}")
    if base.model_class not in FAMILIES:
        return
    layers = [name for name, layer in build_on_meta(base).named_modules() if isinstance(layer, nn.Linear)]
    for name in names:
        if not any(f"{name}." in f"{layer}." for layer in layers):
            known = dict.fromkeys(part for layer in layers for part in layer.split(".") if not part.isdigit())
            raise ValueError(
                f"{SETTING}: {setting} names {name!r}, but this {base.model_class} has no Linear layer of that name or "
                f"inside a module of that name{did_you_mean(name, known)}; its layers are {', '.join(known)}"
            )


def _check_names(given: Mapping[str, Any], config_class: Any) -> None:
    """Raise a ValueError for unknown arguments, which some of these classes silently ignore."""
    known = [name for name in inspect.signature(config_class).parameters if name not in ("self", "kwargs")]
    for name in given:
        if name not in known:
            raise ValueError(
                f"{SETTING}: unknown quant_kwargs {name}{did_you_mean(name, known)}; {config_class.__name__} takes "
                + ", ".join(known)
            )
