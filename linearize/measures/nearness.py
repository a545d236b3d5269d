"""How near a conversion's predictions are to its base's: what `lineardit nearness` measures.

    error_i = sum |s(x_i) - b(x_i)|^2 / sum |b(x_i)|^2         over prompts and elements
b the base's prediction, s the converted model's, for the latents x_i that the base is given in call i of a picture

One number for each denoising step (two where guidance calls the model twice in a step), without a picture of the
converted model: a few forward passes distinguish methods and settings where comparing pictures takes hundreds of them.
It does not show how errors add up over the steps, or what training repairs.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from ..calling import draw_latents, original_call
from ..families import family_of
from ..networks import denoiser
from .recording import Prediction, predict, recording, to_device


@dataclass(frozen=True, kw_only=True)
class Nearness:
    """How far a model's predictions are from its base's.

    Attributes:
        errors: One for each call in a picture, in denoising order; 0 for the base itself.
        seconds: Median time of one prediction.
    """

    errors: tuple[float, ...]
    seconds: float

    @property
    def mean(self) -> float:
        """The mean error over the calls."""
        return sum(self.errors) / len(self.errors)


def record_predictions(
    pipe: Any,
    prompts: Sequence[str],
    *,
    size: tuple[int, int],
    steps: int = 8,
    seed: int = 0,
    guidance: float | None = None,
    max_sequence_length: int | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> list[Prediction]:
    """Record the base's predictions in every step of one picture for each prompt.

    Args:
        pipe: The original text-to-image pipeline, on the device to run on.
        size: (height, width) of the pictures in pixels.
        seed: Noise of picture i comes from `torch.Generator("cpu").manual_seed(seed + i)`.
        guidance: `guidance_scale` of the pipeline; None: the pipeline's own.
        max_sequence_length: Text tokens; None: the pipeline's own.
        arguments: Further arguments of the pipeline's call, such as {"negative_prompt": "blurry"}.
    Raises:
        UnsupportedModelError: the model's class is not known.
        ValueError: a setting is out of range or not known to this pipeline, or the pipeline is converted.
    """
    _, model = denoiser(pipe)
    family_of(model)
    call = original_call(
        pipe,
        prompts,
        size=size,
        steps=steps,
        guidance=guidance,
        max_sequence_length=max_sequence_length,
        arguments=arguments,
    )
    predictions: list[Prediction] = []
    for index, prompt in enumerate(tqdm(prompts, desc="base", unit="picture")):
        with recording(model) as recorded:
            draw_latents(pipe, prompt, seed + index, call)
        predictions += recorded
    return predictions


@torch.no_grad()
def nearness(pipe: Any, predictions: Sequence[Prediction], *, name: str = "nearness") -> Nearness:
    """The error of this pipeline's denoiser against its base's predictions.

    Args:
        pipe: The converted pipeline, on the device to run on.
        predictions: Predictions of its base.
        name: Label of the progress bar.
    Raises:
        ValueError: the model's predictions have another shape.
    """
    _, model = denoiser(pipe)
    device = pipe._execution_device
    sums: dict[int, tuple[float, float]] = {}
    seconds = []
    for prediction in tqdm(predictions, desc=name, unit="prediction"):
        arguments = to_device(prediction.arguments, device)
        began = time.perf_counter()
        output = predict(model, arguments).float().cpu()
        seconds.append(time.perf_counter() - began)
        if output.shape != prediction.output.shape:
            shapes = f"{tuple(output.shape)}, the base {tuple(prediction.output.shape)}"
            raise ValueError(f"the model must be a conversion of the base, but it predicts {shapes}")
        expected = prediction.output.float()
        error, norm = sums.get(prediction.index, (0.0, 0.0))
        sums[prediction.index] = (
            error + float((output - expected).square().sum()),
            norm + float(expected.square().sum()),
        )
    return Nearness(errors=tuple(error / norm for error, norm in sums.values()), seconds=median(seconds))
