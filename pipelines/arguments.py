"""What the settings of the command line are called in a pipeline's call."""

import inspect
from collections.abc import Mapping
from typing import Any


def call_arguments(pipe: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the pipeline's call, those left open (None) left out.

    Raises:
        ValueError: the pipeline does not take one.
    """
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
    known = inspect.signature(pipe.__call__).parameters
    call = {}
    for name, value in settings.items():
        argument = names.get(name, name)
        if value is not None and argument not in known:
            raise ValueError(f"{type(pipe).__name__} takes no {argument}: leave {name} out, got {value}")
        if value is not None:
            call[argument] = value
    return call
