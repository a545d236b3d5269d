"""What settings are called in a pipeline's call."""

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

_NAMES = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
# What has a setting of its own, or is set by whoever calls the pipeline.
_TAKEN = ("prompt", "height", "width", "generator", "latents", "output_type", "return_dict", "max_sequence_length")


def call_arguments(pipe: Any, settings: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Arguments of the pipeline's call; settings that are None are left to the pipeline.

    Args:
        settings: steps, guidance, height, width, max_sequence_length.
        more: Arguments by the pipeline's own names, such as {"negative_prompt": "blurry"}.
    Raises:
        ValueError: the pipeline does not take one, or one of `more` has a setting.
    """
    known = inspect.signature(pipe.__call__).parameters
    call = {}
    for name, value in settings.items():
        argument = _NAMES.get(name, name)
        if value is not None and argument not in known:
            raise ValueError(f"{type(pipe).__name__} takes no {argument}: leave {name} out, got {value}")
        if value is not None:
            call[argument] = value
    for name, value in (more or {}).items():
        if name in _TAKEN or name in _NAMES.values() or name.startswith("callback"):
            raise ValueError(f"{name} is no further argument: it has a setting of its own, or is not to be set")
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise ValueError(f"{type(pipe).__name__} takes no {name}" + (f"; did you mean {near[0]}?" if near else ""))
        call[name] = value
    return call
