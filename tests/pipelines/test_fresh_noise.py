"""Stochastic steps: the same picture from the same seed, whatever the batch, in the pipeline and in a cascade."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from cascade_case import converted, seeded
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny_distill import build_tiny

from lineardit import HighResolutionPipeline, dense
from lineardit.pipelines.fresh_noise import draw_noise_from, with_fresh_noise
from lineardit.pipelines.generate import generate
from lineardit.pipelines.plan import Settings

PROMPTS = ["a red circle", "a blue square", "a green cross"]
CALL: dict[str, Any] = {"size": (24, 32), "steps": 3, "max_sequence_length": 8, "seed": 3}


@pytest.fixture
def pipe() -> Any:
    pipe = build_tiny()
    pipe.scheduler = with_fresh_noise(pipe.scheduler)
    return pipe


def pixels(files: list[Path]) -> numpy.ndarray:
    arrays = []
    for file in files:
        with Image.open(file) as image:
            arrays.append(numpy.asarray(image, numpy.int16))
    return numpy.stack(arrays)


@pytest.mark.parametrize("return_dict", [True, False])
def test_step_adds_the_generators_noise_to_the_predicted_clean_latents(return_dict: bool) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(2)
    sigma, following = scheduler.sigmas[:2]
    latents, velocity = torch.randn(2, 2, 3, 4, 5, generator=seeded(9))
    with draw_noise_from(scheduler, [seeded(1), seeded(2)]):
        actual = scheduler.step(velocity, scheduler.timesteps[0], latents, return_dict=return_dict)[0]
    noise = torch.stack([torch.randn(3, 4, 5, generator=seeded(seed)) for seed in (1, 2)])
    expected = (1 - following) * (latents - sigma * velocity) + following * noise
    torch.testing.assert_close(actual, expected)
    assert scheduler.step_index == 1 and "step" not in vars(scheduler)


def test_fresh_noise_of_a_picture_does_not_depend_on_the_batch(pipe: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    one = pixels(generate(pipe, PROMPTS, tmp_path / "one", **CALL))
    torch.manual_seed(1)
    two = pixels(generate(pipe, PROMPTS, tmp_path / "two", batch_size=2, **CALL))
    assert abs(one - two).max() <= 1
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, stochastic_sampling=False)
    plain = pixels(generate(pipe, PROMPTS, tmp_path / "plain", **CALL))
    assert all(abs(one - plain).reshape(3, -1).max(1) > 1)


def test_first_stage_of_a_cascade_is_the_picture_of_generate(tmp_path: Path) -> None:
    pipe = converted()
    pipe.scheduler = with_fresh_noise(pipe.scheduler)
    high = HighResolutionPipeline.from_pipe(pipe)
    plan = high.plan(32, 32, num_inference_steps=3, settings=Settings(steps=1))
    seen = []

    def keep(_pipe: Any, _number: int, outputs: dict[str, Any]) -> None:
        seen.extend(outputs.get("images", ()))

    call: dict[str, Any] = {"plan": plan, "max_sequence_length": 8, "output_type": "latent"}
    images = [high(PROMPTS[0], generator=seeded(3), callback_on_stage_end=keep, **call).images for _ in range(2)]
    first = plan.stages[0]
    with dense(pipe):
        (file,) = generate(
            pipe, PROMPTS[:1], tmp_path / "out.png", **CALL | {"size": (first.height, first.width)}, cascade=False
        )
    assert torch.equal(*images)
    assert numpy.array_equal(numpy.asarray(seen[0]), pixels([file])[0])


def test_with_fresh_noise_refuses_other_schedulers() -> None:
    with pytest.raises(ValueError, match=r"--stochastic.*need a FlowMatchEuler.*has a DDIMScheduler: leave them out"):
        with_fresh_noise(DDIMScheduler())
