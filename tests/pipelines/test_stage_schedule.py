"""Stages that start midway equal diffusers' image-to-image pipelines, whatever the scheduler."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from cascade_case import seeded
from diffusers.schedulers import KarrasDiffusionSchedulers
from model_cascades import cascade_of

from lineardit.pipelines.plan import Plan, Settings, Stage
from lineardit.pipelines.stage_schedule import scheduler_of
from lineardit.pipelines.vae import encode_faithfully


def second_stages(
    high: Any, image_to_image: Any, arguments: dict[str, Any], plan: Plan, options: dict[str, Any], **flags: Any
) -> tuple[Any, Any]:
    """Latents of the cascade's second stage, and those of diffusers' image-to-image pipeline."""
    seen: dict[str, Any] = {}
    call: dict[str, Any] = {"output_type": "latent", **arguments}

    def keep(_pipe: Any, number: int, outputs: dict[str, Any]) -> None:
        if number == 0:
            seen.update(outputs)

    latents = high(plan=plan, generator=seeded(), callback_on_stage_end=keep, **call).images
    (seed,) = torch.randint(2**62, (2,), generator=seeded()).tolist()[1:]
    last = plan.stages[1]
    pixels = high.image_processor.preprocess(seen["images"], height=last.height, width=last.width)
    clean = encode_faithfully(high.vae, pixels, tile=None)
    stock = image_to_image(**high.components, **flags)
    stock.set_progress_bar_config(disable=True)
    return latents, stock(image=clean, generator=seeded(seed), **options, **call).images


def same(actual: Any, expected: Any) -> bool:
    return torch.allclose(actual, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", [one.name for one in KarrasDiffusionSchedulers if one.name != "PNDMScheduler"])
def test_later_stage_of_sd_is_diffusers_image_to_image(name: str) -> None:
    high, arguments, side = cascade_of("sd")
    try:
        scheduler = getattr(diffusers, name)()
    except ImportError as error:
        pytest.skip(str(error))
    plain = {key: value for key, value in {"steps_offset": 1, "clip_sample": False}.items() if key in scheduler.config}
    high.scheduler = scheduler.from_config(scheduler.config, **plain)
    plan = high.plan(2 * side, 2 * side, num_inference_steps=2, settings=Settings(steps=3, strength=0.6, sharpen=0))
    options, flags = {"strength": 0.6, "num_inference_steps": 5}, {"requires_safety_checker": False}
    assert same(*second_stages(high, diffusers.StableDiffusionImg2ImgPipeline, arguments, plan, options, **flags))


def test_pndm_is_replaced_in_stages_that_start_midway() -> None:
    """Its first steps are special: started midway, it would leave the noise of one step."""
    high, arguments, side = cascade_of("sd")
    high.scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    plan = high.plan(2 * side, 2 * side, num_inference_steps=2, settings=Settings(steps=3))
    kinds: list[str] = []

    def note(pipe: Any, *_: Any) -> dict[str, Any]:
        kinds.append(type(pipe.scheduler).__name__)
        return {}

    high(plan=plan, generator=seeded(), output_type="latent", callback_on_step_end=note, **arguments)
    assert kinds == [*["PNDMScheduler"] * 3, *["DDIMScheduler"] * 3]


def test_later_stage_of_sdxl_is_diffusers_image_to_image() -> None:
    high, arguments, side = cascade_of("sdxl")
    plan = high.plan(2 * side, 2 * side, num_inference_steps=2, settings=Settings(steps=3, strength=0.6, sharpen=0))
    options, flags = {"strength": 0.6, "num_inference_steps": 5}, {"add_watermarker": False}
    assert same(*second_stages(high, diffusers.StableDiffusionXLImg2ImgPipeline, arguments, plan, options, **flags))


def test_later_stage_of_sd3_is_diffusers_image_to_image() -> None:
    high, arguments, side = cascade_of("sd3")
    high.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)  # otherwise the stock call shifts them again
    settings = Settings(steps=3, strength=0.6, shift=3.0, follow=0, sharpen=0)
    plan = high.plan(2 * side, 2 * side, num_inference_steps=2, settings=settings)
    options = {"strength": 1.0, "num_inference_steps": 3, "sigmas": plan.stages[1].sigmas()}
    assert same(*second_stages(high, diffusers.StableDiffusion3Img2ImgPipeline, arguments, plan, options))


def test_lcm_timesteps_stay_below_the_strength() -> None:
    """The last step adds no noise only if `num_inference_steps` counts all timesteps."""
    high, _, side = cascade_of("sd")
    high.scheduler = diffusers.LCMScheduler()
    plan = high.plan(2 * side, 2 * side, settings=Settings(steps=4, strength=0.5))
    scheduler = scheduler_of(plan.stages[1], high.scheduler, torch.device("cpu"))
    scheduler.set_timesteps(50)
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == 4
    assert scheduler.timesteps[0] <= 500 and type(scheduler).__name__ == "LCMScheduler"
    with pytest.raises(ValueError, match="at most 25 steps at strength"):
        high.plan(2 * side, 2 * side, settings=Settings(steps=26, strength=0.5))


def test_cogview4_gets_timesteps_before_the_shift() -> None:
    """Its noise levels are shifted."""
    high, arguments, side = cascade_of("cogview4")
    dynamic = {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 0.25, "max_shift": 0.75}
    high.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, **dynamic)
    plan = high.plan(2 * side, 2 * side, num_inference_steps=2, settings=Settings(steps=3))
    assert plan.stages[1].shift == 0.25 + 0.75 * 4  # 4,096 tokens are 16 times 256
    recorded: list[tuple[float, float]] = []

    def record(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        recorded.append((float(pipe.scheduler.timesteps[step]), float(pipe.scheduler.sigmas[step])))
        return {}

    high(plan=plan, generator=seeded(), output_type="latent", callback_on_step_end=record, **arguments)
    tokens = (2 * side // high.vae_scale_factor // high.transformer.config.patch_size) ** 2
    mu = 0.25 + 0.75 * (tokens / 256) ** 0.5
    for timestep, sigma in recorded[2:]:
        t = timestep / 1000
        assert sigma == pytest.approx(mu * t / (1 + (mu - 1) * t), rel=1e-4)


def test_pndm_saved_and_loaded_makes_the_same_steps(tmp_path: Path) -> None:
    """A loaded config holds defaults that a config made in code leaves to its class."""
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
    scheduler.save_pretrained(tmp_path)
    stage = Stage(height=64, width=64, steps=3, strength=0.5)
    original, loaded = (
        scheduler_of(stage, source, torch.device("cpu"))
        for source in (scheduler, diffusers.PNDMScheduler.from_pretrained(tmp_path))
    )
    assert original.final_alpha_cumprod == loaded.final_alpha_cumprod == scheduler.final_alpha_cumprod


def test_later_stages_follow_and_add_no_fresh_noise() -> None:
    high, _, side = cascade_of("sd3")
    high.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    stage = high.plan(2 * side, 2 * side).stages[1]
    assert stage.follow == 1
    assert not scheduler_of(stage, high.scheduler, torch.device("cpu")).config.stochastic_sampling
