"""What a denoiser is called with while its pipeline makes a picture, kept on the CPU and called again.

The arguments of one call are all that a forward needs, whatever the pipeline: noisy latents, time, text, masks,
guidance, residuals of a ControlNet. So a base and its conversion can be compared, or one teach the other, without
knowing how this kind of model is trained.
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
        index: Of the call, in its picture.
        arguments: By name; tensors, the noisy latents among them, on the CPU.
        output: What it predicts, in the shape of the model's output, on the CPU.
    """

    index: int
    arguments: Arguments
    output: Tensor


@contextmanager
def recording(model: nn.Module) -> Iterator[list[Prediction]]:
    """Inside, every call of this denoiser for one picture is kept.

    A tensor that comes again unchanged in the next call or the one after it, as the text's embeddings do (guided and
    not in turn), is copied once.
    """
    predictions: list[Prediction] = []
    called: list[dict[str, Any]] = []
    copies: deque[dict[int, tuple[Tensor, int, Tensor]]] = deque(maxlen=3)  # of this call and two before: by id

    def before(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        earlier = {number: copy for call in copies for number, copy in call.items()}
        copies.append(kept := {})

        def on_cpu(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.is_inference():  # counts no changes
                return value.to("cpu", copy=True)
            original, version, copy = earlier.get(id(value), (None, 0, value))
            if original is None or version != value._version:
                copy = value.detach().to("cpu", copy=True)
            kept[id(value)] = value, value._version, copy
            return copy

        called.append(tree_map(on_cpu, _by_name(model, args, kwargs)))  # the model may empty its lists

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
    """What the denoiser is first called with when the pipeline is called so; nothing is denoised."""
    _, model = denoiser(pipe)
    caught: list[dict[str, Any]] = []

    def catch(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(_by_name(model, args, kwargs))
        raise _Enough

    handle = model.register_forward_pre_hook(catch, with_kwargs=True, prepend=True)  # before a conversion's own
    try:
        pipe(**call)
    except _Enough:
        return caught[0]
    finally:
        handle.remove()
    raise ValueError(f"{type(pipe).__name__} made a picture without a call of its {type(model).__name__}")


class _Enough(Exception):
    """Ends a pipeline's call."""


def predict(model: nn.Module, arguments: Arguments) -> Tensor:
    """The prediction of one call."""
    return prediction_of(model, model(**with_own_lists(arguments)))


def with_own_lists(arguments: Arguments) -> dict[str, Any]:
    """The same tensors in new lists: some models empty the lists that they are given."""
    return {name: tree_map(lambda one: one, value) for name, value in arguments.items()}


def to_device(arguments: Arguments, device: torch.device) -> dict[str, Any]:
    """The same arguments with their tensors on this device."""
    return {
        name: tree_map(lambda one: one.to(device) if isinstance(one, Tensor) else one, value)
        for name, value in arguments.items()
    }


def prediction_of(model: nn.Module, output: Any) -> Tensor:
    """The prediction, of a tuple or of diffusers' output class; where each sample has one of its own, all flattened.

    Models that were trained to predict a variance as well (PixArt, DiT, HunyuanDiT, Lumina-Next) give it after the
    rest, and pipelines leave it.
    """
    prediction = output[0]
    if isinstance(prediction, Tensor):
        config: Any = model.config
        twice = 2 * (config.get("in_channels") or 0)
        learnt = config.get("learn_sigma") or config.get("out_channels") == twice
        with_variance = learnt and prediction.ndim == 4 and prediction.shape[1] == twice
        return prediction.chunk(2, dim=1)[0] if with_variance else prediction
    return torch.cat([one.flatten() for one in prediction])


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    arguments = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    return arguments | arguments.pop("kwargs", {})
