"""Samples of a teacher in the form of a shard: tensors by name, and texts for its header.

For FLUX.1 a sample is its final latents and conditions; for any other model, calls of its denoiser.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..linearize.calling import arguments_in_errors, call_arguments, draw_latents
from ..linearize.measures.recording import recording
from ..linearize.networks import denoiser
from .calls import pack, sample_calls
from .data import Sample
from .latent_functions import latent_functions


class ShardContent(NamedTuple):
    """What goes into a shard."""

    tensors: dict[str, Tensor]
    texts: dict[str, str]


@torch.no_grad()
def final_latents(pipe: Any, batch: Mapping[int, Sample], settings: Mapping[str, Any]) -> ShardContent:
    """Latents and conditions of samples of one size, which are given by index."""
    functions = latent_functions(denoiser(pipe)[1])
    first = next(iter(batch.values()))
    conditions = functions.encode(pipe, [sample.prompt for sample in batch.values()], settings["max_sequence_length"])
    latents = functions.generate(
        pipe,
        conditions,
        height=first.height,
        width=first.width,
        steps=settings["steps"],
        guidance=settings["guidance"],
        generators=[torch.Generator("cpu").manual_seed(sample.seed) for sample in batch.values()],
    )
    for sample, one in zip(batch.values(), latents, strict=True):
        _check_finite(one, "latents", sample)
    parts = {"latents": latents, **conditions}
    tensors = {
        f"{index:08d}.{name}": one[row].cpu().clone() for row, index in enumerate(batch) for name, one in parts.items()
    }
    return ShardContent(tensors, {})


def kept_calls(pipe: Any, batch: Mapping[int, Sample], settings: Mapping[str, Any]) -> ShardContent:
    """Calls of the denoiser that draw the picture of one sample.

    Raises:
        ValueError: the pipeline needs other arguments or makes fewer calls, a call cannot be stored, or predictions are
            not finite.
    """
    ((index, sample),) = batch.items()
    call = teacher_call_arguments(pipe, (sample.height, sample.width), settings)
    with recording(denoiser(pipe)[1]) as predictions:
        try:
            with arguments_in_errors(pipe, settings["arguments"]):
                draw_latents(pipe, sample.prompt, sample.seed, call)
        except (TypeError, AttributeError) as error:  # what diffusers raises for a missing argument
            raise ValueError(
                f"{type(pipe).__name__} needs more than a prompt and a size ({error}): pass its other arguments"
            ) from error
    if len(predictions) < settings["calls"]:
        raise ValueError(f"calls must be <= {len(predictions)}, the number of calls in {settings['steps']} steps")
    _check_finite(predictions[-1].output, "predictions", sample)
    name = f"{index:08d}"
    kept = sample_calls(predictions, settings["calls"], sample.seed)
    tensors, text = pack([one.arguments for one in kept], name)
    return ShardContent(tensors, {name: text})


def teacher_call_arguments(pipe: Any, size: tuple[int, int], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the pipeline's call for samples of this size, (height, width) in pixels.

    Raises:
        ValueError: the pipeline does not know a setting.
    """
    named = {name: settings[name] for name in ("steps", "guidance", "max_sequence_length")}
    return call_arguments(pipe, {"height": size[0], "width": size[1], **named}, settings["arguments"])


def _check_finite(tensor: Tensor, name: str, sample: Sample) -> None:
    if not tensor.isfinite().all():
        raise ValueError(
            f"the teacher's {name} for {sample.prompt!r} with seed {sample.seed} are not finite in {tensor.dtype}: "
            "load it in another dtype (--dtype) or leave this prompt out, in another folder"
        )
