"""Cascades of models other than FLUX.1: each stage is what diffusers' own calls make, whatever the scheduler."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from cascade_case import seeded
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image

from lineardit import Clear, HighResolutionPipeline, UnsupportedModelError, linearize_
from lineardit.linearize.convert import denoiser
from lineardit.pipelines.latents import pack_latents, patches_of, unpack_latents
from lineardit.pipelines.plan import Plan, Settings
from lineardit.pipelines.stage_schedule import scheduler_of
from lineardit.pipelines.stock import packs_latents
from lineardit.pipelines.vae import decode, encode, encode_faithfully, latent_channels, pixels_per_latent
from tiny_stock import STOCK
from tiny_stock.positions import flux2_vae
from tiny_stock.stock import vae


def qwen_vae(channels: int) -> Any:
    """Two by two pixels for each latent, whose statistics differ from channel to channel."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, 0.2, 0.3, 0.4][:channels],
        latents_std=[1.5, 1.0, 0.5, 2.0][:channels],
    ).eval()


# Those that have a cascade, and the VAE where the tiny pipeline has none.
CASCADES: dict[str, Callable[[], Any] | None] = {
    **dict.fromkeys(("flux", "chroma", "ovis-image", "bria")),
    **dict.fromkeys(("sd", "sdxl", "hunyuan-dit", "pixart-alpha", "pixart-sigma", "lumina-next", "sd3", "auraflow")),
    **dict.fromkeys(("cogview4", "cogview3-plus", "prx")),
    "flux2": flux2_vae,
    "flux2-klein": None,
    "qwen-image": partial(qwen_vae, 4),
    "krea2": partial(qwen_vae, 1),
    "z-image": partial(vae, 4),
    "lumina2": partial(vae, 4, blocks=4),
}
REFUSED = {
    "flux-fill": "takes 24 numbers a token where text-to-image takes 4 or 1",
    "glm-image": "takes image: after linearize_ call its own pipelines",
    "dit": "takes no prompt",
    "wan": "takes num_frames",
    "hidream": "draws one area, whatever size is asked for",
    "ideogram4": "needs an AutoencoderKL as the VAE of the Ideogram4Pipeline, it has a AutoencoderKLFlux2",
    "kandinsky5": "it has none",
    "sd3-controlnet": "takes control_image",
}
NEITHER = ("height", "width", "output_type", "use_resolution_binning")


def made(name: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and what it is called with besides a size."""
    stock = STOCK[name]
    try:
        getattr(diffusers, stock.needs)
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"this diffusers has no {stock.needs}: {error}")
    pipe = stock.make()
    if make := CASCADES.get(name):
        pipe = type(pipe)(**{**pipe.components, "vae": make()})
    if hasattr(getattr(pipe, "vae", None), "bn"):
        pipe.vae.bn.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3, -0.4]))
        pipe.vae.bn.running_var.copy_(torch.tensor([0.5, 1.0, 1.5, 2.0]))
    pipe.set_progress_bar_config(disable=True)
    return pipe, {key: value for key, value in stock.arguments().items() if key not in NEITHER}


def cascade_of(name: str) -> tuple[Any, dict[str, Any], int]:
    """A converted cascade, its arguments, and a side in pixels that the model can make."""
    pipe, arguments = made(name)
    if name == "z-image":
        pipe.transformer.register_to_config(axes_lens=(512, 512, 512))
    linearize_(pipe, Clear(radius=1.5))
    high = HighResolutionPipeline.from_pipe(pipe, native_size=8)
    high.set_progress_bar_config(disable=True)
    side = max(8, high.plan(8, 8).stages[-1].height)
    high.native_size = side
    return high, arguments, side


@pytest.mark.parametrize("name", CASCADES)
def test_a_cascade_makes_the_size_and_leaves_the_model_as_it_was(name: str) -> None:
    high, arguments, side = cascade_of(name)
    plan = high.plan(2 * side, 2 * side - 3, num_inference_steps=2, settings=Settings(steps=2))
    assert [stage.attention for stage in plan.stages] == ["original", "converted"]
    flows = isinstance(high.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    assert (plan.stages[1].shift is not None) == flows and plan.stages[1].follow == flows
    scheduler = high.scheduler
    images = high(plan=plan, generator=seeded(), **arguments).images
    assert [image.size for image in images] == [(2 * side - 3, 2 * side)] * 2
    assert high.scheduler is scheduler and denoiser(high)[1]._lineardit_state.enabled


@pytest.mark.parametrize("name", CASCADES)
def test_with_next_to_no_noise_a_picture_stays(name: str) -> None:
    """So latents are scaled, shifted, and laid out as the stock pipeline has them."""
    high, arguments, side = cascade_of(name)
    picture = Image.linear_gradient("L").convert("RGB").resize((side, side))
    (stage,) = high.plan(side, side, enlarge=True, settings=Settings(steps=2, strength=0.002)).stages
    plan = Plan(height=side, width=side, stages=(replace(stage, height=side, width=2 * side),))
    latents = high(plan=plan, image=picture, generator=seeded(), output_type="latent", **arguments).images
    pixels = high.image_processor.preprocess(picture, height=side, width=2 * side)
    wanted = encode_faithfully(high.vae, pixels, tile=None)
    if packs_latents(high):
        if name.startswith("flux2"):
            of_pipeline = high._pack_latents(high._patchify_latents(wanted))
        else:
            of_pipeline = high._pack_latents(wanted, 1, *wanted.shape[1:])
        assert torch.equal(pack_latents(wanted), of_pipeline)
        latents = unpack_latents(latents, *wanted.shape[-2:])
    assert latents.shape == (2, *wanted.shape[1:])
    assert (latents - wanted).abs().max() < 0.25 * max(1.0, float(wanted.std()))


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_cascade_is_refused(name: str) -> None:
    pipe, _ = made(name)
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
        HighResolutionPipeline.from_pipe(pipe)


def second_stages(
    high: Any, image_to_image: Any, arguments: dict[str, Any], plan: Plan, how: dict[str, Any], **flags: Any
) -> tuple[Any, Any]:
    """Latents of the cascade's second stage, and the same by diffusers' image-to-image pipeline."""
    seen: dict[str, Any] = {}
    call: dict[str, Any] = {"output_type": "latent", **arguments}

    def keep(_pipe: Any, number: int, made: dict[str, Any]) -> None:
        if number == 0:
            seen.update(made)

    ours = high(plan=plan, generator=seeded(), callback_on_stage_end=keep, **call).images
    (seed,) = torch.randint(2**62, (2,), generator=seeded()).tolist()[1:]
    last = plan.stages[1]
    pixels = high.image_processor.preprocess(seen["images"], height=last.height, width=last.width)
    clean = encode_faithfully(high.vae, pixels, tile=None)
    stock = image_to_image(**high.components, **flags)
    stock.set_progress_bar_config(disable=True)
    return ours, stock(image=clean, generator=seeded(seed), **how, **call).images


def same(ours: Any, theirs: Any) -> bool:
    return torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", [one.name for one in KarrasDiffusionSchedulers if one.name != "PNDMScheduler"])
def test_later_stage_of_sd_is_diffusers_image_to_image(name: str) -> None:
    high, arguments, side = cascade_of("sd")
    try:
        scheduler = getattr(diffusers, name)()
    except ImportError as error:
        pytest.skip(str(error))
    plain = {key: value for key, value in {"steps_offset": 1, "clip_sample": False}.items() if key in scheduler.config}
    high.scheduler = scheduler.from_config(scheduler.config, **plain)
    plan = high.plan(2 * side, 2 * side, num_inference_steps=2, settings=Settings(steps=3, strength=0.6))
    how, flags = {"strength": 0.6, "num_inference_steps": 5}, {"requires_safety_checker": False}
    assert same(*second_stages(high, diffusers.StableDiffusionImg2ImgPipeline, arguments, plan, how, **flags))


def test_pndm_is_replaced_where_it_would_begin_midway() -> None:
    """Its first steps are special: begun midway, it would leave the noise of a step."""
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
    plan = high.plan(2 * side, 2 * side, num_inference_steps=2, settings=Settings(steps=3, strength=0.6))
    how, flags = {"strength": 0.6, "num_inference_steps": 5}, {"add_watermarker": False}
    assert same(*second_stages(high, diffusers.StableDiffusionXLImg2ImgPipeline, arguments, plan, how, **flags))


def test_later_stage_of_sd3_is_diffusers_image_to_image() -> None:
    high, arguments, side = cascade_of("sd3")
    high.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)  # else stock shifts the levels once more
    settings = Settings(steps=3, strength=0.6, shift=3.0, follow=0)
    plan = high.plan(2 * side, 2 * side, num_inference_steps=2, settings=settings)
    how = {"strength": 1.0, "num_inference_steps": 3, "sigmas": plan.stages[1].sigmas()}
    assert same(*second_stages(high, diffusers.StableDiffusion3Img2ImgPipeline, arguments, plan, how))


def test_steps_of_consistency_models_lie_below_the_strength() -> None:
    """Their last step adds no noise."""
    high, _, side = cascade_of("sd")
    high.scheduler = diffusers.LCMScheduler()
    plan = high.plan(2 * side, 2 * side, settings=Settings(steps=4, strength=0.5))
    scheduler = scheduler_of(plan.stages[1], high.scheduler, torch.device("cpu"))
    scheduler.set_timesteps(50)
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == 4
    assert scheduler.timesteps[0] <= 500 and type(scheduler).__name__ == "LCMScheduler"
    with pytest.raises(ValueError, match="at most 25 steps at strength"):
        high.plan(2 * side, 2 * side, settings=Settings(steps=26, strength=0.5))


def test_a_model_that_is_told_levels_before_their_shift_is_told_so() -> None:
    """CogView4: its timesteps are not shifted, and its noise levels are."""
    high, arguments, side = cascade_of("cogview4")
    dynamic = {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 0.25, "max_shift": 0.75}
    high.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, **dynamic)
    plan = high.plan(2 * side, 2 * side, num_inference_steps=2, settings=Settings(steps=3))
    assert plan.stages[1].shift == 0.25 + 0.75 * 4  # 4,096 tokens are 16 times 256
    told: list[tuple[float, float]] = []

    def note(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        told.append((float(pipe.scheduler.timesteps[step]), float(pipe.scheduler.sigmas[step])))
        return {}

    high(plan=plan, generator=seeded(), output_type="latent", callback_on_step_end=note, **arguments)
    tokens = (2 * side // high.vae_scale_factor // high.transformer.config.patch_size) ** 2
    mu = 0.25 + 0.75 * (tokens / 256) ** 0.5
    for timestep, sigma in told[2:]:
        t = timestep / 1000
        assert sigma == pytest.approx(mu * t / (1 + (mu - 1) * t), rel=1e-4)


@pytest.mark.parametrize("name", CASCADES)
def test_native_side_and_first_steps_are_the_pipelines_own(name: str) -> None:
    pipe, _ = made(name)
    high = HighResolutionPipeline.from_pipe(pipe)
    sides = {"auraflow": 1024, "krea2": 1024, "flux2": 1024, "flux2-klein": 1024, "prx": 512}  # others by their configs
    assert high.native_size == sides.get(name, high.native_size) == HighResolutionPipeline.from_pipe(high).native_size
    steps = inspect.signature(high.stock.__call__).parameters["num_inference_steps"].default
    assert high.plan(8, 8).stages[0].steps == steps


def test_arguments_by_place_are_those_of_the_stock_pipeline() -> None:
    high, arguments, side = cascade_of("sd")
    made = [
        high(*given, generator=seeded(), output_type="latent", **arguments, **named).images
        for given, named in (
            ((None, side, side, 2), {}),
            ((), {"height": side, "width": side, "num_inference_steps": 2}),
        )
    ]
    assert torch.equal(*made)
    pixart, arguments, side = cascade_of("pixart-sigma")
    with pytest.raises(TypeError, match="unexpected keyword argument 'callback_on_step_end'"):
        pixart(callback_on_step_end=lambda *_: {}, **arguments)


def test_low_frequencies_follow_in_latents_that_are_pictures() -> None:
    high, arguments, side = cascade_of("sd3")
    call: dict[str, Any] = {"output_type": "latent", **arguments}
    made = []
    for follow in (0.0, 1.0):
        plan = high.plan(2 * side, 2 * side, num_inference_steps=2, settings=Settings(steps=4, follow=follow))
        made.append(high(plan=plan, generator=seeded(), **call).images)
    assert made[0].shape == made[1].shape and not torch.allclose(*made)


@pytest.mark.parametrize(
    ("name", "size", "settings", "said"),
    [
        ("sd", 128, Settings(follow=0.5), "leave follow out, got 0.5"),
        ("sd", 128, Settings(shift=3.0), "shift is of schedulers of flow matching, not of a DDIMScheduler"),
        ("sd", 128, Settings(rope_factor=2.0), "no rotary base to scale, so rope_factor must be 1, got 2.0"),
        ("qwen-image", 128, Settings(rope_factor=2.0), "no rotary base to scale"),
        ("sd", 128, Settings(proportional=1.0), "proportional attention is of transformers"),
        ("sd3", 132, Settings(), "positions for at most 128 pixels a side, got 132x132: make that, and enlarge it by"),
        ("auraflow", 500, Settings(), "positions for at most .* pixels a side"),
        ("cogview3-plus", 5000, Settings(), "positions for at most .* pixels a side"),
        ("lumina-next", 20000, Settings(), "positions for at most .* pixels a side"),
    ],
)
def test_plan_refuses_what_a_model_does_not_have(name: str, size: int, settings: Settings, said: str) -> None:
    high, _, _ = cascade_of(name)
    with pytest.raises(ValueError, match=said):
        high.plan(size, size, settings=settings)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shift": 3.0}, "shift is of schedulers of flow matching, not of a DDIMScheduler: leave it out, got 3.0"),
        ({"follow": 0.5}, "low frequencies follow in flow matching, .*, not with a DDIMScheduler"),
        ({"chunk_tokens": 9}, "this model does not run in chunks of tokens: leave chunk_tokens out, 9"),
        ({"rope_factor": 2.0}, "no rotary base to scale, so rope_factor must be 1, got 2.0"),
        ({"logit_factor": 1.1}, "proportional attention is of transformers: leave it out, got 1.1"),
        ({"strength": 0.001}, "a DDIMScheduler has at most 1 steps at strength 0.001, got 8"),
    ],
)
def test_call_refuses_a_stage_that_a_model_does_not_have(change: dict[str, Any], said: str) -> None:
    high, arguments, side = cascade_of("sd")
    plan = high.plan(2 * side, 2 * side, num_inference_steps=2)
    plan = replace(plan, stages=(plan.stages[0], replace(plan.stages[1], **change)))
    with pytest.raises(ValueError, match=said):
        high(plan=plan, **arguments)
    with pytest.raises(TypeError, match="unexpected keyword argument 'latents'"):
        high(latents=torch.zeros(1), **arguments)


def test_half_precision_of_a_vae_that_overflows_is_float32_for_a_while() -> None:
    half, whole = vae(4, blocks=4), vae(4, blocks=4)
    for one in (half, whole):
        one.register_to_config(scaling_factor=0.13025)
    whole.load_state_dict(half.state_dict())
    half.half()
    kinds: list[torch.dtype] = []
    half.decoder.register_forward_pre_hook(lambda _module, given: kinds.append(given[0].dtype))
    latents = torch.randn(1, 4, 8, 8)
    made = decode(half, latents.half(), tile=None)
    assert kinds == [torch.float32] and half.dtype == torch.float16
    half.register_to_config(force_upcast=False)
    decode(half, latents.half(), tile=None)
    assert kinds[1] == torch.float16
    half.register_to_config(force_upcast=True, scaling_factor=0.18215)  # the default of every AutoencoderKL
    decode(half, latents.half(), tile=None)
    assert kinds[2] == torch.float16
    assert torch.allclose(made, decode(whole, latents, tile=None), atol=0.02)


def test_latents_are_normalized_by_channel_where_the_vae_says_so() -> None:
    plain = vae(4)
    normalized = vae(4)
    normalized.load_state_dict(plain.state_dict())
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.5, 1.0, 0.5, 2.0]
    normalized.register_to_config(latents_mean=mean, latents_std=std)
    pixels = torch.randn(1, 3, 16, 16).clamp(-1, 1)
    latents, own = encode(normalized, pixels, tile=None), encode(plain, pixels, tile=None)
    of_channels = (torch.tensor(one)[:, None, None] for one in (mean, std))
    factor = plain.config.scaling_factor
    shift, scale = of_channels
    assert torch.allclose(latents, (own / factor - shift) * factor / scale, atol=1e-6)
    assert torch.allclose(decode(normalized, latents, tile=None), decode(plain, own, tile=None), atol=1e-5)
    pipe, _ = made("flux2-klein")
    flux2 = pipe.vae
    pixels = torch.randn(1, 3, 32, 64).clamp(-1, 1)
    latents = encode(flux2, pixels, tile=None)
    assert torch.allclose(patches_of(latents), pipe._encode_vae_image(pixels, None), atol=1e-5)
    again = decode(flux2, latents, tile=None)
    assert torch.allclose(again, flux2.decode(flux2.encode(pixels).latent_dist.mode()).sample, atol=1e-5)
    qwen = qwen_vae(4)
    assert (latent_channels(qwen), pixels_per_latent(qwen)) == (4, 2)


def test_pictures_pass_the_safety_checker() -> None:
    """A cascade decodes by itself, so that the stock pipeline's last lines do not run."""
    high, arguments, side = cascade_of("sd")
    seen: list[tuple[int, ...]] = []

    def check(pixels: Any, _device: Any, _dtype: Any) -> tuple[Any, list[bool]]:
        seen.append(tuple(pixels.shape))
        return torch.zeros_like(pixels), [True] * len(pixels)

    high.safety_checker, high.run_safety_checker = object(), check
    plan = high.plan(2 * side, 2 * side, num_inference_steps=2, settings=Settings(steps=2))
    images = high(plan=plan, generator=seeded(), **arguments).images
    assert seen == [(2, 3, 2 * side, 2 * side)] and {image.getextrema() for image in images} == {((0, 0),) * 3}
