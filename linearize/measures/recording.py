"""Records the calls of a denoiser on the CPU while its pipeline makes a picture, and repeats them.

The arguments of one call are all that a forward needs in any pipeline: noisy latents, timestep, text, masks, guidance,
residuals of a ControlNet. So a base and its conversion can be compared, or one teach the other, without knowing how
this kind of model is trained.
"""

import inspect
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..networks import denoiser

Arguments = Mapping[str, Any]  # of a forward, by name


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One call of a denoiser.

    Attributes:
        index: Index of the call in its picture.
        arguments: By name; tensors, including the noisy latents, are on the CPU.
        output: The prediction, as `prediction_of` returns it, on the CPU.
    """

    index: int
    arguments: Arguments
    output: Tensor


@contextmanager
def recording(model: nn.Module) -> Iterator[list[Prediction]]:
    """Context manager that records every call of this denoiser while one picture is made.

    A tensor that returns unchanged in one of the next two calls is copied once, such as the text embeddings, which
    alternate between guided and unguided calls.
    """
    predictions: list[Prediction] = []
    called: list[dict[str, Any]] = []
    copies: deque[dict[int, tuple[Tensor, int, Tensor]]] = deque(maxlen=3)  # by id, of this call and the two before

    def before(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        earlier = {number: copy for call in copies for number, copy in call.items()}
        copies.append(kept := {})

        def on_cpu(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.is_inference():  # has no version counter
                return value.to("cpu", copy=True)
            original, version, copy = earlier.get(id(value), (None, 0, value))
            if original is None or version != value._version:
                copy = value.detach().to("cpu", copy=True)
            kept[id(value)] = value, value._version, copy
            return copy

        called.append(tree_map(on_cpu, _by_name(model, args, kwargs)))  # copies lists, which the model may empty

    def after(_model: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        output = prediction_of(model, output).detach().to("cpu", copy=True)
        predictions.append(Prediction(index=len(predictions), arguments=called.pop(), output=output))

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after),
    ]
    try:
        yield predictions
    finally:
        for handle in handles:
            handle.remove()


def first_call(pipe: Any, **call: Any) -> Arguments:
    """Arguments of the denoiser's first call when the pipeline is called like this; nothing is denoised."""
    _, model = denoiser(pipe)
    caught: list[dict[str, Any]] = []

    def catch(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(_by_name(model, args, kwargs))
        raise _StopCall

    handle = model.register_forward_pre_hook(catch, with_kwargs=True, prepend=True)  # before a conversion's hooks
    try:
        pipe(**call)
    except _StopCall:
        return caught[0]
    finally:
        handle.remove()
    raise ValueError(f"{type(pipe).__name__} generated an image without calling its {type(model).__name__}")


class _StopCall(Exception):
    """Ends a pipeline's call."""


def predict(model: nn.Module, arguments: Arguments) -> Tensor:
    """The prediction of one call."""
    return prediction_of(model, model(**copy_lists(arguments)))


def copy_lists(arguments: Arguments) -> dict[str, Any]:
    """The same tensors in new lists: some models empty the lists that they are given."""
    return {name: tree_map(lambda one: one, value) for name, value in arguments.items()}


def to_device(arguments: Arguments, device: torch.device) -> dict[str, Any]:
    """The same arguments with their tensors on this device."""
    return {
        name: tree_map(lambda one: one.to(device) if isinstance(one, Tensor) else one, value)
        for name, value in arguments.items()
    }


def prediction_of(model: nn.Module, output: Any) -> Tensor:
    """The prediction in a tuple or diffusers output class; a list of one per sample is flattened and concatenated.

    Models that were trained to predict a variance as well (PixArt, DiT, HunyuanDiT, Lumina-Next) return it in the
    last channels; it is dropped here, as in pipelines.
    """
    prediction = output[0]
    if isinstance(prediction, Tensor):
        config: Any = model.config
        twice_channels = 2 * (config.get("in_channels") or 0)
        learns_variance = config.get("learn_sigma") or config.get("out_channels") == twice_channels
        with_variance = learns_variance and prediction.ndim == 4 and prediction.shape[1] == twice_channels
        return prediction.chunk(2, dim=1)[0] if with_variance else prediction
    return torch.cat([one.flatten() for one in prediction])


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    arguments = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    return arguments | arguments.pop("kwargs", {})
