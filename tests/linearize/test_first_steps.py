"""`first_steps`: linear attention for the first steps of a pipeline, the base's for the rest."""

from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import diffusers
import pytest
import torch
from tiny_pipelines import flux_pipeline
from torch import Tensor

from lineardit import Agent, dense, first_steps, linearize_
from lineardit.linearize.weights.full_weights import replace_weights_

STEPS = 3


@pytest.fixture
def pipe() -> diffusers.FluxPipeline:
    pipe = flux_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe: Any, **arguments: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    prompt = {"prompt_embeds": torch.ones(1, 3, 32), "pooled_prompt_embeds": torch.ones(1, 32)}
    options = {"height": 16, "width": 24, "num_inference_steps": STEPS, "output_type": "latent", **arguments}
    return pipe(**prompt, **options, generator=generator).images


def linear_in_each_step(pipe: Any, count: int) -> list[bool]:
    """Whether attention was linear in each step of two calls."""
    conversion = vars(pipe.transformer)["_lineardit_conversion"]
    seen: list[bool] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(conversion.enabled))
    with first_steps(pipe, count) as on_step_end:
        paint(pipe, callback_on_step_end=on_step_end)
        assert conversion.enabled
        paint(pipe, callback_on_step_end=on_step_end)
    handle.remove()
    return seen


@pytest.mark.parametrize("count", [1, 2, STEPS, STEPS + 1])
def test_first_steps_are_linear_in_every_call(pipe: diffusers.FluxPipeline, count: int) -> None:
    linearize_(pipe, Agent(num_agents=4))
    assert linear_in_each_step(pipe, count) == [step < count for step in range(STEPS)] * 2


def test_first_steps_latents_differ_from_all_linear_and_all_dense(pipe: diffusers.FluxPipeline) -> None:
    linearize_(pipe, Agent(num_agents=4, second_scale_exponent=0.3, shortcut=0.075))
    with dense(pipe):
        all_dense = paint(pipe)
    all_linear = paint(pipe)
    with first_steps(pipe, 1) as on_step_end:
        mixed = paint(pipe, callback_on_step_end=on_step_end)
    assert torch.equal(paint(pipe), all_linear)
    for other in (all_dense, all_linear):
        assert not torch.allclose(mixed, other, atol=1e-4)


def test_first_steps_enables_linear_attention_after_an_aborted_call(pipe: diffusers.FluxPipeline) -> None:
    linearize_(pipe, Agent(num_agents=4))
    conversion = vars(pipe.transformer)["_lineardit_conversion"]

    with pytest.raises(KeyboardInterrupt), first_steps(pipe, 1) as on_step_end:

        def stop(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            tensors = on_step_end(pipeline, step, timestep, tensors)
            assert not conversion.enabled
            raise KeyboardInterrupt

        paint(pipe, callback_on_step_end=stop)
    assert conversion.enabled


@pytest.mark.parametrize("cause", ["interrupt", "error"])
def test_first_steps_starts_linear_again_in_the_call_after_an_aborted_one(
    pipe: diffusers.FluxPipeline, cause: str
) -> None:
    linearize_(pipe, Agent(num_agents=4))
    conversion = vars(pipe.transformer)["_lineardit_conversion"]
    seen: list[bool] = []

    def stop(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        tensors = on_step_end(pipeline, step, timestep, tensors)
        if cause == "error":
            raise RuntimeError("broken off")
        pipeline._interrupt = True
        return tensors

    with first_steps(pipe, 1) as on_step_end:
        with nullcontext() if cause == "interrupt" else pytest.raises(RuntimeError, match="broken off"):
            paint(pipe, callback_on_step_end=stop)
        pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(conversion.enabled))
        paint(pipe, callback_on_step_end=on_step_end)
    assert seen == [True] + [False] * (STEPS - 1)
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler


def test_first_steps_nests_and_leaves_scheduler_copies_independent(pipe: diffusers.FluxPipeline) -> None:
    linearize_(pipe, Agent(num_agents=4))
    with first_steps(pipe, 1), first_steps(pipe, 2):
        pipe.scheduler.set_timesteps(5, mu=1.0)
        for copied in (deepcopy(pipe.scheduler), type(pipe.scheduler).from_config(pipe.scheduler.config)):
            copied.set_timesteps(3, mu=1.0)
            assert (len(copied.timesteps), len(pipe.scheduler.timesteps)) == (3, 5)
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler


def test_first_steps_refuses_invalid_models_and_counts(pipe: diffusers.FluxPipeline) -> None:
    with pytest.raises(ValueError, match="not converted"), first_steps(pipe, 2):
        pass
    with pytest.raises(ValueError, match="count must be >= 1, got 0"), first_steps(pipe, 0):
        pass
    linearize_(pipe, Agent(num_agents=4))
    weights = {"x_embedder.bias": torch.zeros(pipe.transformer.x_embedder.bias.shape)}
    replace_weights_(pipe.transformer, weights, keep_original=False)
    with pytest.raises(ValueError, match="were not kept"), first_steps(pipe, 2):
        pass
