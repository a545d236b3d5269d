"""Low frequencies that follow a reference."""

from typing import Any

import pytest
import torch
from cascade_case import PROMPT, converted, seeded
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from lineardit import HighResolutionPipeline
from lineardit.pipelines.latents import pack_latents, unpack_latents
from lineardit.pipelines.low_frequencies import LowFrequencies, noise_levels
from lineardit.pipelines.plan import Settings
from lineardit.pipelines.vae import encode


def test_after_step_moves_the_predicted_picture_and_not_the_noise() -> None:
    """If the model predicts both exactly, weight 1 replaces the picture's low frequencies by the reference's."""
    generator = torch.Generator().manual_seed(0)
    picture, noise = (torch.randn(1, 4, 16, 24, generator=generator) for _ in range(2))
    reference = torch.full_like(picture, 3.0)
    sigma, following = 0.75, 0.5
    before, after = ((1 - t) * picture + t * noise for t in (sigma, following))
    corrected = LowFrequencies(reference, follow=1 / following).after_step(before, after, sigma, following)
    predicted = (corrected - following * noise) / (1 - following)
    low = torch.nn.functional.avg_pool2d(predicted, 8)  # exact but for the filter's reach across cells
    assert (low - 3).abs().max() < 0.6
    high = predicted - LowFrequencies(predicted, follow=1).target
    assert torch.allclose(high.std(), (picture - LowFrequencies(picture, follow=1).target).std(), rtol=0.15)


@pytest.mark.parametrize("size", [(1, 1), (2, 30), (18, 7)])
def test_low_frequencies_of_small_latents_keep_the_mean(size: tuple[int, int]) -> None:
    assert torch.allclose(LowFrequencies(torch.full((1, 4, *size), 3.0), follow=1).target, torch.tensor(3.0))


def test_after_step_leaves_the_last_step_alone() -> None:
    before, after = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    assert torch.equal(LowFrequencies(torch.zeros(1, 4, 8, 8), follow=0.5).after_step(before, after, 0.3, 0.0), after)


def test_noise_levels_are_those_of_the_last_step() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.2])
    scheduler.set_begin_index(0)
    for expected in ((0.9, 0.5), (0.5, 0.2), (0.2, 0.0)):
        scheduler.step(torch.zeros(1, 1), scheduler.timesteps[0], torch.zeros(1, 1))
        assert torch.allclose(torch.tensor(noise_levels(scheduler)), torch.tensor(expected))


def test_pack_latents_equals_the_flux_pipelines() -> None:
    from diffusers import FluxPipeline

    latents = torch.randn(2, 4, 6, 10)
    tokens = pack_latents(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 4, 6, 10))
    assert torch.equal(unpack_latents(tokens, 6, 10), latents)


@pytest.fixture
def high() -> Any:
    return HighResolutionPipeline.from_pipe(converted())


def test_following_keeps_the_picture_near_the_previous_stage(high: Any) -> None:
    """A model with random weights drifts; following low frequencies keeps it nearer to the enlarged picture."""
    picture = Image.linear_gradient("L").convert("RGB")
    pixels = high.image_processor.preprocess(picture, height=32, width=32)
    expected = LowFrequencies(encode(high.vae, pixels, tile=None), follow=1).target
    errors = []
    for follow in (0.0, 1.0):
        plan = high.plan(32, 32, enlarge=True, settings=Settings(steps=6, follow=follow, rope_factor=1, strength=0.9))
        call: dict[str, Any] = {"plan": plan, "generator": seeded(), "max_sequence_length": 8, "output_type": "latent"}
        latents = unpack_latents(high(PROMPT, image=picture, **call).images, 16, 16)
        errors.append(float((LowFrequencies(latents, follow=1).target - expected).abs().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_following_holds_whatever_the_callback_returns(high: Any) -> None:
    settings = Settings(steps=3, follow=1, rope_factor=1, strength=0.9)
    plan = high.plan(32, 32, enlarge=True, settings=settings)
    call: dict[str, Any] = {"plan": plan, "max_sequence_length": 8, "output_type": "latent"}
    call["image"] = Image.linear_gradient("L").convert("RGB")
    images = [
        high(PROMPT, generator=seeded(), callback_on_step_end=callback, **call).images
        for callback in (None, lambda *_: {}, lambda *given: given[3])
    ]
    assert torch.equal(images[1], images[0]) and torch.equal(images[2], images[0])
