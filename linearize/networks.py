"""The networks of a pipeline: its denoiser, and others that can be converted as well."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import nn

from .errors import UnsupportedModelError
from .families.refused import MULTI_CONTROLNETS


def denoiser(pipe_or_model: Any) -> tuple[str, nn.Module]:
    """The network that denoises, and its name in a pipeline: "transformer" or "unet".

    Raises:
        UnsupportedModelError: it is neither a pipeline that has one nor a model.
    """
    if isinstance(pipe_or_model, nn.Module):
        model = _unwrapped(pipe_or_model)
        return ("unet" if type(model).__name__.startswith("UNet") else "transformer"), model
    for name in ("transformer", "unet"):
        part = getattr(pipe_or_model, name, None)
        if isinstance(part, nn.Module):
            return name, _unwrapped(part)
    raise UnsupportedModelError(
        f"expected a pipeline with a `transformer` or `unet`, or such a model, got {type(pipe_or_model).__name__}"
    )


def networks(pipe_or_model: Any) -> Iterator[tuple[str, nn.Module]]:
    """(name, network) of the denoiser, then of a pipeline's other networks, with each net of a multi-ControlNet."""
    name, model = denoiser(pipe_or_model)
    yield name, model
    if isinstance(pipe_or_model, nn.Module):
        return
    components: Mapping[str, Any] = getattr(pipe_or_model, "components", {})
    for other, part in components.items():
        if type(part).__name__ in MULTI_CONTROLNETS:
            yield from ((f"{other}.nets[{index}]", _unwrapped(net)) for index, net in enumerate(part.nets))
        elif other != name and isinstance(part, nn.Module):
            yield other, _unwrapped(part)


def _unwrapped(model: nn.Module) -> nn.Module:
    """What `torch.compile(model)` and peft's `get_peft_model(model, ...)` wrap."""
    names = {cls.__name__ for cls in type(model).__mro__}
    if "OptimizedModule" in names:
        return _unwrapped(cast(nn.Module, model._orig_mod))
    return _unwrapped(cast(Any, model).get_base_model()) if "PeftModel" in names else model
