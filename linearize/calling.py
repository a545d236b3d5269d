"""Arguments of a pipeline's call: its names for settings, its defaults, and further arguments."""

import inspect
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .errors import NOT_ARGUMENT_ERRORS, is_out_of_memory
from .networks import denoiser
from .seam.conversion import conversion_of

logger = logging.getLogger(__name__)

_NAMES = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
# Arguments that have their own setting, or that callers of the pipeline set.
_RESERVED = (
    *("prompt", "height", "width", "generator", "latents", "output_type", "return_dict", "max_sequence_length"),
    *("num_images_per_prompt", "sigmas", "timesteps", "image", "plan", "start_latents", "start_stage"),
)
BINNING = "use_resolution_binning"  # would draw at another size and resize the picture


class DefaultSettings(NamedTuple):
    """Defaults of a pipeline's call; None: it has no such argument, or no default for it."""

    steps: int | None
    guidance: float | None
    max_sequence_length: int | None


def default_settings(pipe: Any) -> DefaultSettings:
    """The defaults of this pipeline's call."""
    parameters = inspect.signature(pipe.__call__).parameters
    named = [parameters.get(_NAMES.get(name, name)) for name in DefaultSettings._fields]
    steps, guidance, text = (None if one is None or one.default is one.empty else one.default for one in named)
    return DefaultSettings(steps, None if guidance is None else float(guidance), text)


def call_arguments(pipe: Any, settings: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Arguments of the pipeline's call; settings that are None are left to the pipeline.

    Args:
        settings: steps, guidance, height, width, max_sequence_length.
        extra: Arguments by the pipeline's own names, such as {"negative_prompt": "blurry"}.
    Raises:
        ValueError: the pipeline does not take an argument, a value is not finite, or one of `extra` has its own
            setting.
    """
    parameters = inspect.signature(pipe.__call__).parameters.values()
    known = {one.name: one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    extra = extra or {}
    for name, value in {**settings, **extra}.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    call = {}
    for name, value in settings.items():
        argument = _NAMES.get(name, name)
        if value is not None and argument not in known:
            raise ValueError(f"{type(pipe).__name__} takes no {argument}: leave {name} out, got {value}")
        if value is not None:
            call[argument] = value
    if "height" in call and BINNING in known:
        call[BINNING] = False
    for name, value in extra.items():
        if name in _RESERVED or name in _NAMES.values() or name.startswith("callback"):
            raise ValueError(f"{name} cannot be a further argument: it has its own setting, or must not be set")
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise ValueError(f"{type(pipe).__name__} takes no {name}" + (f"; did you mean {near[0]}?" if near else ""))
        as_tuple = isinstance(value, list) and "tuple" in str(known[name].annotation).lower()
        call[name] = tuple(value) if as_tuple else value
    if "true_cfg_scale" in known:
        scale = extra.get("true_cfg_scale", known["true_cfg_scale"].default)
        if type(scale) not in (int, float):
            raise ValueError(f"true_cfg_scale must be a number, got {scale!r}")
        if (scale > 1) != ("negative_prompt" in extra):
            warn_unguided(type(pipe).__name__, scale)
    return call


@lru_cache  # warn once
def warn_unguided(name: str, scale: float) -> None:
    """Warn that a pipeline which supports guidance runs without it."""
    message = '%s is guided only with a negative prompt: add --argument negative_prompt=" " (its true_cfg_scale is %g)'
    if scale <= 1:
        message = "%s ignores a negative prompt while its true_cfg_scale is %g: add --argument true_cfg_scale=4.0"
    logger.warning(message, name, scale)


@contextmanager
def arguments_in_errors(pipe: Any, arguments: Mapping[str, Any] | None) -> Iterator[None]:
    """Context manager that blames the pipeline's errors on the further arguments that it was given, if any.

    Raises:
        ValueError: the pipeline raised an error; names the arguments.
    """
    try:
        yield
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError) as error:
        if not arguments or isinstance(error, NOT_ARGUMENT_ERRORS) or is_out_of_memory(error):
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise ValueError(f"{type(pipe).__name__} failed with {given} ({type(error).__name__}: {error})") from error


def draw_latents(pipe: Any, prompt: str, seed: int, call: Mapping[str, Any]) -> None:
    """Draw one picture without decoding it, for hooks to observe; its noise is `manual_seed(seed)` on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    progress_bar = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe(prompt=prompt, generator=generator, output_type="latent", **call)
    finally:
        pipe.set_progress_bar_config(**progress_bar)


def for_batch(call: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The call for `count` prompts at a time: some pipelines need a negative or second prompt for each of them."""
    return {
        name: [value] * count if isinstance(value, str) and name.startswith(("negative_prompt", "prompt_")) else value
        for name, value in call.items()
    }


def original_call(
    pipe: Any,
    prompts: Sequence[str],
    *,
    size: tuple[int, int],
    steps: int,
    guidance: float | None,
    max_sequence_length: int | None,
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Arguments of the pipeline's call for each prompt; settings that are None are left to the pipeline.

    Raises:
        ValueError: a setting is out of range or not known to this pipeline, or the pipeline is converted.
    """
    if conversion_of(denoiser(pipe)[1]) is not None:
        raise ValueError("pipe must be the original pipeline, got a converted one; call restore_ first")
    check_counts(prompts, {"steps": steps, "max_sequence_length": max_sequence_length})
    settings = {"height": size[0], "width": size[1], "steps": steps, "guidance": guidance}
    return call_arguments(pipe, settings | {"max_sequence_length": max_sequence_length}, arguments)


def check_counts(prompts: Sequence[str], counts: Mapping[str, int | None]) -> None:
    """Raise a ValueError if there is no prompt, or a count that is given is below 1."""
    if not prompts:
        raise ValueError("prompts must hold at least one, got none")
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
