"""Arguments of a pipeline call: their names, defaults, and refusals."""

from typing import Any

import pytest
import torch
from prompted import prompted
from tiny_distill import build_tiny

from lineardit.linearize import KernelNotReachedError
from lineardit.linearize.calling import arguments_in_errors, call_arguments, default_settings, for_batch, warn_unguided
from lineardit.linearize.errors import NotFiniteError


def test_call_arguments_uses_pipeline_names_and_omits_none() -> None:
    settings = {"steps": 3, "guidance": None, "height": 16, "max_sequence_length": 8}
    call = call_arguments(build_tiny(), settings, {"negative_prompt": "blurry", "true_cfg_scale": 2.0})
    assert call == {
        "num_inference_steps": 3,
        "height": 16,
        "max_sequence_length": 8,
        "negative_prompt": "blurry",
        "true_cfg_scale": 2.0,
    }


def test_call_arguments_disables_resolution_binning_for_a_given_size() -> None:
    pipe = prompted("pixart-sigma")
    assert call_arguments(pipe, {"height": 16, "width": 16})["use_resolution_binning"] is False
    assert call_arguments(pipe, {"height": 16}, {"use_resolution_binning": True})["use_resolution_binning"] is True
    assert "use_resolution_binning" not in call_arguments(pipe, {"steps": 2})


def test_call_arguments_warns_once_about_ineffective_guidance(caplog: pytest.LogCaptureFixture) -> None:
    pipe = prompted("qwen-image")
    warn_unguided.cache_clear()
    call_arguments(pipe, {"steps": 2})
    call_arguments(pipe, {"steps": 2})
    assert caplog.text.count("is guided only") == 1
    warn_unguided.cache_clear()
    assert 'is guided only with a negative prompt: add --argument negative_prompt=" "' in caplog.text
    caplog.clear()
    call_arguments(pipe, {"steps": 2}, {"negative_prompt": " "})
    call_arguments(pipe, {"steps": 2}, {"true_cfg_scale": 1.0})
    call_arguments(build_tiny(), {"steps": 2})
    call_arguments(build_tiny(), {"steps": 2}, {"negative_prompt": "blurry", "true_cfg_scale": 2.0})
    assert not caplog.text
    call_arguments(build_tiny(), {"steps": 2}, {"negative_prompt": "blurry"})
    call_arguments(build_tiny(), {"steps": 2}, {"negative_prompt": "blurry"})
    assert caplog.messages == [
        "FluxPipeline ignores a negative prompt while its true_cfg_scale is 1: add --argument true_cfg_scale=4.0"
    ]


def test_for_batch_repeats_single_prompts() -> None:
    call = {"negative_prompt": "blurry", "negative_prompt_2": ["a", "b"], "true_cfg_scale": 2.0, "prompt_2": "oil"}
    assert for_batch(call, 2) == call | {"negative_prompt": ["blurry", "blurry"], "prompt_2": ["oil", "oil"]}


def test_call_arguments_converts_lists_to_tuples_for_pairs() -> None:
    assert call_arguments(prompted("sdxl"), {}, {"original_size": [64, 48]}) == {"original_size": (64, 48)}


def test_arguments_in_errors_adds_the_given_arguments_to_an_error() -> None:
    pipe = build_tiny()
    with (
        pytest.raises(ValueError, match=r"FluxPipeline failed with clip_skip='a' \(IndexError: nothing\)"),
        arguments_in_errors(pipe, {"clip_skip": "a"}),
    ):
        raise IndexError("nothing")
    with pytest.raises(IndexError), arguments_in_errors(pipe, {}):
        raise IndexError("nothing")
    for error in (
        torch.OutOfMemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        NotFiniteError("nan"),
        KernelNotReachedError("attention slicing"),
    ):
        with pytest.raises(type(error)) as raised, arguments_in_errors(pipe, {"clip_skip": "a"}):
            raise error
        assert raised.value is error


def test_default_settings_reads_the_pipeline_defaults() -> None:
    assert default_settings(build_tiny()) == (28, 3.5, 512)
    assert default_settings(prompted("sdxl")) == (50, 5.0, None)


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        ({"clip_skip": 2}, {}, "FluxPipeline takes no clip_skip: leave clip_skip out, got 2"),
        ({}, {"negativ_prompt": ""}, "FluxPipeline takes no negativ_prompt; did you mean negative_prompt?"),
        ({}, {"height": 3}, "height cannot be a further argument: it has its own setting"),
        ({}, {"guidance_scale": 3.0}, "guidance_scale cannot be a further argument"),
        ({}, {"callback_on_step_end": "x"}, "callback_on_step_end cannot be a further argument"),
        ({}, {"num_images_per_prompt": 2}, "num_images_per_prompt cannot be a further argument"),
        ({}, {"sigmas": []}, "sigmas cannot be a further argument"),
        ({}, {"true_cfg_scale": "abc"}, "true_cfg_scale must be a number, got 'abc'"),
        ({"guidance": float("nan")}, {}, "guidance must be finite, got nan"),
        ({}, {"true_cfg_scale": float("inf")}, "true_cfg_scale must be finite, got inf"),
    ],
)
def test_call_arguments_refuses_unknown_and_invalid_arguments(
    settings: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        call_arguments(build_tiny(), settings, more)
