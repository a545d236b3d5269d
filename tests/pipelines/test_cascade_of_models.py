"""Cascades of models other than FLUX.1: sizes, latents, texts and callbacks as in the stock pipelines."""

import inspect
from dataclasses import replace
from math import prod
from typing import Any

import diffusers
import pytest
import torch
from cascade_case import seeded
from model_cascades import CASCADES, cascade_of, pipeline_and_arguments
from PIL import Image
from whole_pipelines import WHOLE

from lineardit import HighResolutionPipeline, UnsupportedModelError
from lineardit.linearize.networks import denoiser
from lineardit.pipelines import estimate
from lineardit.pipelines.estimate import Estimator, forwards_of
from lineardit.pipelines.latents import pack_latents, unpack_latents
from lineardit.pipelines.plan import Plan, Settings
from lineardit.pipelines.positions import positions_stretched, table_side
from lineardit.pipelines.sizes import size_multiple
from lineardit.pipelines.stock import packs_latents
from lineardit.pipelines.vae import encode_faithfully

REFUSED = {
    "flux-fill": "takes 24 numbers per token, but text-to-image takes 4 or 1",
    "glm-image": "takes image: after linearize_, call its own pipelines",
    "dit": "takes no prompt",
    "wan": "takes num_frames",
    "hidream": "draws at a fixed area, whatever size is requested",
    "ideogram4": "needs an AutoencoderKL as the VAE of the Ideogram4Pipeline, it has a AutoencoderKLFlux2",
    "kandinsky5": "it has none",
    "sd3-controlnet": "takes control_image",
}


@pytest.mark.parametrize("name", CASCADES)
def test_cascade_makes_the_size_and_restores_the_model(name: str) -> None:
    high, arguments, side = cascade_of(name)
    plan = high.plan(2 * side, 2 * side - 3, num_inference_steps=2, settings=Settings(steps=2))
    assert [stage.attention for stage in plan.stages] == ["original", "converted"]
    flows = isinstance(high.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    assert (plan.stages[1].shift is not None) == flows and plan.stages[1].follow == flows
    scheduler = high.scheduler
    images = high(plan=plan, generator=seeded(), **arguments).images
    assert [image.size for image in images] == [(2 * side - 3, 2 * side)] * 2
    assert high.scheduler is scheduler and denoiser(high)[1]._lineardit_conversion.enabled


@pytest.mark.parametrize("name", ["sd3", "cogview3-plus", "auraflow"])
def test_position_table_is_stretched_beyond_its_end(name: str) -> None:
    high, arguments, _ = cascade_of(name)
    model = denoiser(high)[1]
    covered, multiple = table_side(model), size_multiple(high)
    assert covered is not None
    small, large = (covered * multiple, covered * multiple), ((covered + 2) * multiple, covered * multiple)
    plan = high.plan(*small, settings=Settings(steps=1))
    assert not any("stretched" in note for note in plan.notes)
    plan = high.plan(*large, settings=Settings(steps=1))
    assert f"covers {covered * multiple} pixels a side and is stretched beyond" in "\n".join(plan.notes)
    assert plan.stages[-1].gib > plan.stages[0].gib
    embedding = model.patch_embed if name == "cogview3-plus" else model.pos_embed
    table, before = embedding.pos_embed, embedding.pos_embed.clone()
    picture = Image.linear_gradient("L").convert("RGB")
    last = replace(plan, stages=plan.stages[-1:])
    (image, _) = high(plan=last, image=picture, generator=seeded(), **arguments).images
    assert image.size == large[::-1]
    assert table_side(model) == covered
    assert embedding.pos_embed is table and torch.equal(table, before)


@pytest.mark.parametrize("name", ["sd3", "cogview3-plus", "auraflow"])
def test_stretched_positions_interpolate_the_models_own(name: str) -> None:
    """In a table twice as fine, every second entry is one of the model's own."""
    model = denoiser(cascade_of(name)[0])[1]
    embedding = model.patch_embed if name == "cogview3-plus" else model.pos_embed
    covered = table_side(model)
    assert covered is not None
    kept = embedding.pos_embed
    table = kept.reshape(covered, covered, -1)
    side = 2 * covered - 1
    with positions_stretched(model, side, torch.device("cpu")):
        finer = embedding.pos_embed.reshape(side, side, -1)
        assert table_side(model) == side
        assert embedding.pos_embed.dtype == table.dtype
    assert torch.allclose(finer[::2, ::2], table, atol=1e-5)
    assert torch.allclose(finer[1:-1:2, ::2], (table[1:] + table[:-1]) / 2, atol=0.2)
    with positions_stretched(model, covered, torch.device("cpu")):
        assert embedding.pos_embed is kept and table_side(model) == covered


# every model in bfloat16, as it is used, and four in float32
IN_FLOAT32 = ("flux", "sd3", "sdxl", "pixart-sigma")
ESTIMATED = [*((name, torch.bfloat16) for name in CASCADES), *((name, torch.float32) for name in IN_FLOAT32)]


@pytest.mark.parametrize(("name", "dtype"), ESTIMATED, ids=str)
def test_plan_estimates_time_and_memory(name: str, dtype: torch.dtype) -> None:
    high, _, side = cascade_of(name)
    stages = high.to(dtype).plan(2 * side, 2 * side).stages
    assert all(stage.seconds > 0 for stage in stages)
    weights = sum(weight.nbytes for part in high.components.values() if hasattr(part, "parameters")
                  for weight in part.parameters()) / 2**30  # fmt: skip
    assert all(weights < stage.gib < 1.5 * weights + 0.02 for stage in stages)


@pytest.mark.parametrize("name", [name for name in CASCADES if name != "prx"])  # takes no embeddings with guidance
def test_forwards_of_counts_the_forwards_of_a_step(name: str) -> None:
    high, arguments, side = cascade_of(name)
    model, batches = denoiser(high)[1], []

    def note(_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
        batches.append(len(next(given[key] for key in ("hidden_states", "sample", "x") if key in given)))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    steps = 2
    if "true_cfg_scale" in arguments:  # such pipelines guide only with negative prompts
        arguments = {key: value for key, value in arguments.items() if not key.startswith("negative")}
    arguments = {key: value for key, value in arguments.items() if key not in ("guidance_scale", "true_cfg_scale")}
    high(height=side, width=side, num_inference_steps=steps, generator=seeded(), output_type="latent", **arguments)
    handle.remove()
    images = 2  # two prompts
    forwards, together = forwards_of(high)
    assert len(batches) / steps == forwards
    assert {batch / images for batch in batches} == {together}


def test_plan_notes_a_cost_that_cannot_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    high, _, side = cascade_of("sd3")
    estimate.forward.cache_clear()
    monkeypatch.setattr(estimate, "count_step", lambda *_, **__: {}["config"])
    plan = high.plan(2 * side, 2 * side)
    assert "a forward could not be counted (KeyError: 'config')" in plan.notes[-1]
    assert plan.stages[0].seconds is None


def test_plan_estimates_time_with_layerwise_casting() -> None:
    high, _, side = cascade_of("sd3")
    denoiser(high)[1].enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert all(stage.seconds > 0 for stage in high.plan(2 * side, 2 * side).stages)


def test_plan_refuses_bad_counts() -> None:
    high, _, side = cascade_of("sd3")
    for counts, message in (
        ({"batch": 0}, "batch must be an integer >= 1, got 0"),
        ({"batch": None}, "batch must be an integer >= 1, got None"),
        ({"text_len": 1.5}, "text_len must be an integer >= 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            high.plan(side, side, **counts)


def test_plan_estimates_up_to_a_maximum_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    high, _, _ = cascade_of("flux")
    shapes: list[Any] = []
    monkeypatch.setattr(estimate, "forward", shapes.append)
    plan = high.plan(10**6, 10**6)
    assert plan.stages[-1].seconds is None
    assert plan.notes[-1] == "time and memory are estimated only up to 16,777,216 image tokens"
    assert 2**22 < max(prod(shape.latents) // 4 for shape in shapes) <= 2**24


def test_estimator_uses_the_text_length_of_the_pipeline() -> None:
    assert {name: Estimator(cascade_of(name)[0], None, 1).text_len for name in ("sd3", "flux", "sd")} == {
        "sd3": 256 + 77,
        "flux": 512,
        "sd": None,
    }
    assert Estimator(cascade_of("sd3")[0], 10, 1).text_len == 87


@pytest.mark.parametrize("name", CASCADES)
def test_picture_is_kept_with_almost_no_noise(name: str) -> None:
    """So latents have the stock pipeline's scale, shift and layout."""
    high, arguments, side = cascade_of(name)
    picture = Image.linear_gradient("L").convert("RGB").resize((side, side))
    (stage,) = high.plan(side, side, enlarge=True, settings=Settings(steps=2, strength=0.002, sharpen=0)).stages
    plan = Plan(height=side, width=side, stages=(replace(stage, height=side, width=2 * side),))
    latents = high(plan=plan, image=picture, generator=seeded(), output_type="latent", **arguments).images
    pixels = high.image_processor.preprocess(picture, height=side, width=2 * side)
    expected = encode_faithfully(high.vae, pixels, tile=None)
    if packs_latents(high):
        if name.startswith("flux2"):
            packed = high._pack_latents(high._patchify_latents(expected))
        else:
            packed = high._pack_latents(expected, 1, *expected.shape[1:])
        assert torch.equal(pack_latents(expected), packed)
        latents = unpack_latents(latents, *expected.shape[-2:])
    assert latents.shape == (2, *expected.shape[1:])
    assert (latents - expected).abs().max() < 0.25 * max(1.0, float(expected.std()))


@pytest.mark.parametrize("name", REFUSED)
def test_from_pipe_refuses_models_without_a_cascade(name: str) -> None:
    pipe, _ = pipeline_and_arguments(name)
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
        HighResolutionPipeline.from_pipe(pipe)


@pytest.mark.parametrize("name", CASCADES)
def test_native_side_and_first_steps_are_the_pipelines_own(name: str) -> None:
    pipe, _ = pipeline_and_arguments(name)
    high = HighResolutionPipeline.from_pipe(pipe)
    sides = {"auraflow": 1024, "krea2": 1024, "flux2": 1024, "flux2-klein": 1024, "prx": 512}  # others in their configs
    assert high.native_size == sides.get(name, high.native_size) == HighResolutionPipeline.from_pipe(high).native_size
    steps = inspect.signature(high.stock.__call__).parameters["num_inference_steps"].default
    assert high.plan(8, 8).stages[0].steps == steps


def test_positional_arguments_are_those_of_the_stock_pipeline() -> None:
    high, arguments, side = cascade_of("sd")
    images = [
        high(*given, generator=seeded(), output_type="latent", **arguments, **named).images
        for given, named in (
            ((None, side, side, 2), {}),
            ((), {"height": side, "width": side, "num_inference_steps": 2}),
        )
    ]
    assert torch.equal(*images)
    pixart, arguments, side = cascade_of("pixart-sigma")
    with pytest.raises(TypeError, match="unexpected keyword argument 'callback_on_step_end'"):
        pixart(callback_on_step_end=lambda *_: {}, **arguments)


def test_low_frequencies_follow_in_unpacked_latents() -> None:
    high, arguments, side = cascade_of("sd3")
    call: dict[str, Any] = {"output_type": "latent", **arguments}
    images = []
    for follow in (0.0, 1.0):
        plan = high.plan(2 * side, 2 * side, num_inference_steps=2, settings=Settings(steps=4, follow=follow))
        images.append(high(plan=plan, generator=seeded(), **call).images)
    assert images[0].shape == images[1].shape and not torch.allclose(*images)


@pytest.mark.parametrize(
    ("name", "size", "settings", "message"),
    [
        ("sd", 128, Settings(follow=0.5), "follow needs flow matching .* is a DDIMScheduler: leave it out, got 0.5"),
        ("sd", 128, Settings(shift=3.0), "shift needs a flow-matching scheduler, not a DDIMScheduler"),
        ("sd", 128, Settings(rope_factor=2.0), "no rotary base to scale, so rope_factor must be 1, got 2.0"),
        ("qwen-image", 128, Settings(rope_factor=2.0), "no rotary base to scale"),
        ("sd", 128, Settings(proportional=1.0), "proportional attention needs a transformer"),
        ("lumina-next", 20000, Settings(), "for at most .* pixels a side, got .*: generate that size, and enlarge it"),
        ("z-image", 20000, Settings(), "positions for at most .* pixels a side"),
    ],
)
def test_plan_refuses_settings_that_a_model_lacks(name: str, size: int, settings: Settings, message: str) -> None:
    high, _, _ = cascade_of(name)
    with pytest.raises(ValueError, match=message):
        high.plan(size, size, settings=settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift": 3.0}, "shift needs a flow-matching scheduler, not a DDIMScheduler: leave it out, got 3.0"),
        ({"follow": 0.5}, "follow needs flow matching .*, the scheduler is a DDIMScheduler"),
        ({"chunk_tokens": 9}, "this model does not run in chunks of tokens: leave chunk_tokens out, got 9"),
        ({"rope_factor": 2.0}, "no rotary base to scale, so rope_factor must be 1, got 2.0"),
        ({"logit_factor": 1.1}, "proportional attention needs a transformer: leave it out, got 1.1"),
        ({"strength": 0.001}, "a DDIMScheduler has at most 1 steps at strength 0.001, got 8"),
    ],
)
def test_call_refuses_stage_settings_that_a_model_lacks(change: dict[str, Any], message: str) -> None:
    high, arguments, side = cascade_of("sd")
    plan = high.plan(2 * side, 2 * side, num_inference_steps=2)
    plan = replace(plan, stages=(plan.stages[0], replace(plan.stages[1], **change)))
    with pytest.raises(ValueError, match=message):
        high(plan=plan, **arguments)
    with pytest.raises(TypeError, match=r"strength is a setting of the stages .*pipelines\.Settings\(strength=0\.4\)"):
        high(strength=0.4, **arguments)
    with pytest.raises(TypeError, match="unexpected keyword argument 'latents'"):
        high(latents=torch.zeros(1), **arguments)


def test_cascade_runs_the_safety_checker() -> None:
    """A cascade decodes by itself, so the end of the stock pipeline's call does not run."""
    high, arguments, side = cascade_of("sd")
    seen: list[tuple[int, ...]] = []

    def check(pixels: Any, _device: Any, _dtype: Any) -> tuple[Any, list[bool]]:
        seen.append(tuple(pixels.shape))
        return torch.zeros_like(pixels), [True] * len(pixels)

    high.safety_checker, high.run_safety_checker = object(), check
    plan = high.plan(2 * side, 2 * side, num_inference_steps=2, settings=Settings(steps=2))
    result = high(plan=plan, generator=seeded(), **arguments)
    assert seen == [(2, 3, 2 * side, 2 * side)] and {image.getextrema() for image in result.images} == {((0, 0),) * 3}
    assert result.nsfw_content_detected == [True, True]
    latents = high(plan=plan, generator=seeded(), output_type="latent", return_dict=False, **arguments)
    assert len(latents) == 2 and latents[1] is None


def test_callback_can_encode_another_text() -> None:
    pipe = WHOLE["sd"][0]()
    high = HighResolutionPipeline.from_pipe(pipe, native_size=64)
    high.set_progress_bar_config(disable=True)
    plan = high.plan(128, 128, num_inference_steps=2, settings=Settings(steps=2))
    texts, encoded = ["a green cross", "a cyan square on mint"], []

    def switch(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 0:
            encoded.append(pipe.encode_prompt(texts[len(encoded)], pipe.device, 1, True)[0])
        return {}

    high("a red circle", plan=plan, generator=seeded(), output_type="latent", callback_on_step_end=switch)
    expected = [pipe.encode_prompt(text, pipe.device, 1, True)[0] for text in texts]
    assert torch.equal(encoded[0], expected[0]) and torch.equal(encoded[1], expected[1])


def test_replaced_encode_prompt_is_used_and_kept() -> None:
    high = HighResolutionPipeline.from_pipe(WHOLE["sd"][0](), native_size=64)
    high.set_progress_bar_config(disable=True)
    plan = high.plan(128, 128, num_inference_steps=1, settings=Settings(steps=1))
    original, calls = high.encode_prompt, []

    def encode(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        return original(*args, **kwargs)

    high.encode_prompt = encode
    for count in (1, 2):
        high("a red circle", plan=plan, generator=seeded(), output_type="latent")
        assert len(calls) == count and high.encode_prompt is encode


def test_diffusers_callbacks_get_the_tensors_they_request() -> None:
    high, arguments, side = cascade_of("sd3")
    plan = high.plan(2 * side, 2 * side, num_inference_steps=2, settings=Settings(steps=2))
    call: dict[str, Any] = {"plan": plan, "output_type": "latent", **arguments}
    cutoff = diffusers.callbacks.SD3CFGCutoffCallback(cutoff_step_ratio=0.5)
    images = high(generator=seeded(), callback_on_step_end=cutoff, **call).images
    assert images.isfinite().all()
    inputs: dict[str, Any] = {"callback_on_step_end_tensor_inputs": [], "callback_on_step_end": lambda *_: {}}
    assert high(generator=seeded(), **inputs, **call).images.shape == images.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "prompt must hold at least one string"),
        ({"prompt": 5}, "prompt must be a string or a list of strings, got a int"),
        ({"prompt": "a", "generator": 5}, "generator must be a torch.Generator, or a list of them, got a int"),
        ({"prompt": "a", "output_type": "foo"}, "output_type must be pil, np, pt or latent, got 'foo'"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 4, 32)}, "Provide either `prompt` or `prompt_embeds`"),
    ],
)
def test_call_refuses_bad_input_before_encoding_the_picture(change: dict[str, Any], message: str) -> None:
    high, _, side = cascade_of("sd")
    high.vae.encode = None
    with pytest.raises(ValueError, match=message):
        high(image=Image.new("RGB", (side, side)), height=2 * side, width=2 * side, **change)
