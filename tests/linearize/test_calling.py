"""What a pipeline is called with: names, what is left to it, what is refused."""

from typing import Any

import pytest
from tiny_distill import build_tiny

from lineardit.linearize.calling import call_arguments


def test_settings_get_the_pipelines_names_and_none_is_left_to_it() -> None:
    settings = {"steps": 3, "guidance": None, "height": 16, "max_sequence_length": 8}
    call = call_arguments(build_tiny(), settings, {"negative_prompt": "blurry", "true_cfg_scale": 2.0})
    assert call == {
        "num_inference_steps": 3,
        "height": 16,
        "max_sequence_length": 8,
        "negative_prompt": "blurry",
        "true_cfg_scale": 2.0,
    }


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        ({"clip_skip": 2}, {}, "FluxPipeline takes no clip_skip: leave clip_skip out, got 2"),
        ({}, {"negativ_prompt": ""}, "FluxPipeline takes no negativ_prompt; did you mean negative_prompt?"),
        ({}, {"height": 3}, "height is no further argument: it has a setting of its own"),
        ({}, {"guidance_scale": 3.0}, "guidance_scale is no further argument"),
        ({}, {"callback_on_step_end": "x"}, "callback_on_step_end is no further argument"),
    ],
)
def test_what_a_pipeline_does_not_take_is_refused(settings: dict[str, Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        call_arguments(build_tiny(), settings, more)
