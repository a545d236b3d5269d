"""The cascade: each stage equals diffusers' own calls, and the model is restored afterwards."""

import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cascade_case import FEW_STEPS, PROMPT, converted, seeded
from diffusers import (
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    ModularPipeline,
)
from PIL import Image
from tiny_distill import build_tiny

import lineardit
from lineardit import Clear, HighResolutionPipeline, Hybrid, ProxyTokens, dense, linearize_
from lineardit.linearize.convert import swapped
from lineardit.linearize.networks import denoiser
from lineardit.linearize.weights.full_weights import FullWeights, replace_weights_
from lineardit.pipelines.plan import Plan, Settings

CALL: dict[str, Any] = {"max_sequence_length": 8, "num_inference_steps": 2}


@pytest.fixture
def high() -> Any:
    return HighResolutionPipeline.from_pipe(converted())


def test_from_pipe_shares_the_components(high: Any) -> None:
    pipe = converted()
    other = HighResolutionPipeline.from_pipe(pipe, native_size=32)
    assert isinstance(other, HighResolutionPipeline) and isinstance(other, FluxPipeline)
    assert other.components.keys() == pipe.components.keys()
    assert all(other.components[name] is part for name, part in pipe.components.items())
    assert (other.native_size, high.native_size) == (32, 16)
    pipe = converted()
    pipe.transformer.to(torch.bfloat16)
    assert HighResolutionPipeline.from_pipe(pipe).transformer.dtype == torch.bfloat16


def test_native_stage_is_the_stock_pipeline_bit_for_bit(high: Any) -> None:
    base = build_tiny()
    expected = base(PROMPT, height=16, width=16, generator=seeded(), output_type="latent", **CALL).images
    images = high(PROMPT, generator=seeded(), output_type="latent", **CALL).images
    assert torch.equal(images, expected)
    both = high([PROMPT, "b"], generator=[seeded(), seeded(1)], output_type="latent", **CALL).images
    assert torch.allclose(both[:1], expected, atol=1e-5)


def test_later_stage_is_diffusers_image_to_image(high: Any) -> None:
    """Without scaled positions, following or sharpening, from the same noise and noise levels."""
    seen: dict[int, dict[str, Any]] = {}
    plan = high.plan(32, 24, num_inference_steps=2, settings=Settings(steps=3, follow=0, sharpen=0, rope_factor=1))
    images = high(
        PROMPT,
        plan=plan,
        generator=seeded(),
        max_sequence_length=8,
        output_type="latent",
        callback_on_stage_end=lambda _pipe, number, outputs: seen.setdefault(number, {}).update(outputs),
    ).images
    assert [stage.attention for stage in plan.stages] == ["original", "converted"]
    assert set(seen) == {0, 1} and set(seen[0]) == {"latents", "images"} and set(seen[1]) == {"latents"}
    stock = FluxImg2ImgPipeline(**high.components)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = type(stock.scheduler).from_config(stock.scheduler.config, use_dynamic_shifting=False, shift=1.0)
    pixels = stock.image_processor.preprocess(seen[0]["images"], height=32, width=24)
    latents = high.vae.encode(pixels).latent_dist.mode()
    latents = 2 * latents - high.vae.encode(high.vae.decode(latents).sample).latent_dist.mode()
    latents = (latents - high.vae.config.shift_factor) * high.vae.config.scaling_factor
    (seed,) = torch.randint(2**62, (2,), generator=seeded()).tolist()[1:]
    expected = stock(
        PROMPT,
        image=latents,
        height=32,
        width=24,
        strength=1.0,
        sigmas=plan.stages[1].sigmas(),
        num_inference_steps=3,
        guidance_scale=3.5,
        generator=seeded(seed),
        max_sequence_length=8,
        output_type="latent",
    ).images
    assert torch.allclose(images, expected, atol=1e-5)


@pytest.mark.parametrize("size", [(33, 41), (16, 90)])
def test_call_makes_the_requested_size(high: Any, size: tuple[int, int]) -> None:
    plan = high.plan(*size, num_inference_steps=1, settings=Settings(steps=1))
    image = high(PROMPT, plan=plan, generator=seeded(), max_sequence_length=8).images[0]
    assert (image.height, image.width) == size
    assert len(plan.stages) > 1 and "cropped" in str(plan)


def test_call_with_settings_equals_a_call_with_their_plan(high: Any) -> None:
    picture, settings = Image.new("RGB", (16, 16)), Settings(steps=1, strength=0.7, sharpen=0)
    call: dict[str, Any] = {"image": picture, "max_sequence_length": 8, "output_type": "latent"}
    plan = high.plan(32, 32, enlarge=(16, 16), settings=settings)
    planned = high(PROMPT, plan=plan, generator=seeded(), **call).images
    assert torch.equal(high(PROMPT, height=32, width=32, settings=settings, generator=seeded(), **call).images, planned)
    with pytest.raises(ValueError, match=r"settings must be lineardit\.pipelines\.Settings.* or None, got \{\}"):
        high("x", height=16, width=24, settings={})
    with pytest.raises(ValueError, match=r"plan must be what `plan\(height, width\)` returns, or None, got '32x48'"):
        high("x", plan="32x48")
    with pytest.raises(ValueError, match="settings must be left out if a plan is given"):
        high(PROMPT, plan=plan, settings=settings, **call)


def test_model_is_restored_after_a_call_and_after_an_error(high: Any) -> None:
    plan = high.plan(48, 48, num_inference_steps=1, settings=Settings(steps=1, proportional=1.0))
    theta, scheduler, conversion = (
        high.transformer.pos_embed.theta,
        high.scheduler,
        high.transformer._lineardit_conversion,
    )
    inside: list[tuple[float, float, bool]] = []

    def note(*_: Any) -> dict[str, Any]:
        inside.append((high.transformer.pos_embed.theta / theta, conversion.logit_factor, conversion.enabled))
        return {}

    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("stop")

    call: dict[str, Any] = {"plan": plan, "generator": seeded(), "max_sequence_length": 8}
    high(PROMPT, **call, callback_on_step_end=note)
    assert inside == [(stage.rope_factor, stage.logit_factor, stage.attention == "converted") for stage in plan.stages]
    assert inside[-1][0] > 1 and inside[-1][1] > 1
    for stage in range(len(plan.stages)):
        steps: list[int] = []

        def stop(*_: Any, stage: int = stage, steps: list[int] = steps) -> dict[str, Any]:
            steps.append(0)
            return fail() if len(steps) > stage else {}

        with pytest.raises(RuntimeError, match="stop"):
            high(PROMPT, **call, callback_on_step_end=stop)
        assert (high.transformer.pos_embed.theta, conversion.logit_factor, conversion.enabled) == (theta, 1.0, True)
        assert high.scheduler is scheduler


def test_rope_factor_is_diffusers_ntk_factor(high: Any) -> None:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    from lineardit.pipelines.positions import rope_scaled

    ids = torch.arange(7.0)[:, None].expand(-1, 3)
    with rope_scaled(high, 10.0):
        cos, _ = high.transformer.pos_embed(ids)
    dims = high.transformer.config.axes_dims_rope
    expected = [
        get_1d_rotary_pos_embed(dim, ids[:, 0], ntk_factor=10.0, use_real=True, repeat_interleave_real=True)[0]
        for dim in dims
    ]
    assert torch.allclose(cos, torch.cat(expected, -1), atol=1e-6)


@pytest.mark.parametrize("attention", ["original", "converted"])
def test_positions_are_exact_in_bfloat16(high: Any, attention: str) -> None:
    """The stock pipelines' ids are in bfloat16, which rounds 257 to 256."""
    high.to(torch.bfloat16)
    seen: list[torch.Tensor] = []
    high.transformer.pos_embed.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    (stage,) = high.plan(8, 1040, num_inference_steps=1, enlarge=True, settings=Settings(steps=1)).stages[-1:]
    plan = Plan(height=8, width=1040, stages=(replace(stage, attention=attention, rope_factor=1.0),))
    high(PROMPT, image=Image.new("RGB", (1040, 8)), plan=plan, max_sequence_length=8, output_type="latent")
    assert torch.equal(seen[-1][8:, 2], torch.arange(260.0).repeat(2))


def test_saved_cascade_can_be_loaded(high: Any, tmp_path: Path) -> None:
    high.save_pretrained(tmp_path)
    again = HighResolutionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert swapped(denoiser(again)[1]).keys() == swapped(denoiser(high)[1]).keys() and again.native_size == 16
    plan = high.plan(32, 32, num_inference_steps=1, settings=FEW_STEPS)
    call: dict[str, Any] = {"plan": plan, "max_sequence_length": 8, "output_type": "latent"}
    actual, expected = (cascade(PROMPT, generator=seeded(), **call).images for cascade in (again, high))
    assert torch.equal(actual, expected)
    half = HighResolutionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16, native_size=32)
    assert (half.transformer.dtype, half.native_size) == (torch.bfloat16, 32)


def test_pickle_keeps_the_cascade(high: Any) -> None:
    unpickled = pickle.loads(pickle.dumps(high))
    assert type(unpickled) is type(high) and unpickled.native_size == high.native_size
    expected, images = (
        cascade(PROMPT, height=32, width=32, generator=seeded(), max_sequence_length=8, num_inference_steps=1).images
        for cascade in (high, unpickled)
    )
    assert list(images[0].getdata()) == list(expected[0].getdata())


def test_unconverted_pipeline_makes_every_stage_with_its_own_attention() -> None:
    pipe = build_tiny()
    high = HighResolutionPipeline.from_pipe(pipe, native_size=16)
    plan = high.plan(32, 32, num_inference_steps=1, settings=Settings(steps=1))
    assert {stage.attention for stage in plan.stages} == {"original"}
    assert high(PROMPT, plan=plan, generator=seeded(), max_sequence_length=8).images[0].size == (32, 32)
    linearize_(high, Clear(radius=2))
    assert swapped(denoiser(pipe)[1])
    assert high.plan(64, 64).stages[-1].attention == "converted"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: {"plan": replace(plan, stages=plan.stages[1:])}, "first stage has strength below 1: give image"),
        (lambda plan: {"plan": plan, "image": Image.new("RGB", (16, 16))}, "starts from noise and would ignore image"),
        (lambda plan: {"plan": plan, "start_stage": 1}, "start_stage must be 1 to 2 with start_latents"),
        (lambda plan: {"plan": plan, "height": 16}, "height and width must be the plan's, 64 and 64, or left out"),
        (
            lambda plan: {"plan": plan, "num_inference_steps": 9},
            "must be 28, as in the plan's first stage",
        ),
        (lambda plan: {"plan": plan, "prompt": None}, "Provide either `prompt` or `prompt_embeds`"),
        (
            lambda plan: {"plan": replace(plan, stages=(*plan.stages[:-1], replace(plan.stages[-1], width=66)))},
            "sides of a stage must be multiples of 4, got 66x64",
        ),
        (
            lambda plan: {"plan": replace(plan, stages=(plan.stages[0], replace(plan.stages[-1], shift=None)))},
            "shift must be set for a stage with strength below 1, got None",
        ),
        (lambda plan: {"plan": plan, "generator": [seeded()] * 2}, "generator must be one, or a list of 1, one per"),
        (
            lambda plan: {"plan": plan, "start_stage": 1, "start_latents": torch.zeros(1, 9, 16)},
            r"start_latents of stage 0 must be \[1, 16, 16\], got \[1, 9, 16\]",
        ),
        (
            lambda plan: {"height": 64, "width": 64, "image": [Image.new("RGB", (16, 16))] * 2},
            "image must hold a number of pictures that divides 1, got 2",
        ),
    ],
)
def test_call_refuses_arguments_that_do_not_fit_the_plan(
    high: Any, change: Callable[[Any], dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        high(**({"prompt": PROMPT} | change(high.plan(64, 64))))


def test_plan_notes_the_advice_of_a_method_once() -> None:
    pipe = build_tiny()
    linearize_(pipe, Hybrid(local=Clear(radius=2), global_=ProxyTokens(num_proxies=4)))
    high = HighResolutionPipeline.from_pipe(pipe, native_size=16)
    (note,) = [note for note in high.plan(64, 64).notes if "faint grid" in note]
    assert "covers 8 x 8 tokens" in note
    assert not any("faint grid" in note for note in high.plan(16, 16).notes)  # with the original attention


def test_plan_notes_and_counts_the_original_call_in_small_stages() -> None:
    pipe = build_tiny()
    plans = []
    for dense_below in (0, 100):  # the converted stages have 64 and 256 tokens
        linearize_(pipe, Clear(radius=2), dense_below=dense_below)
        high = HighResolutionPipeline.from_pipe(pipe, native_size=16)
        plans.append(high.plan(64, 64))
    note = "converted stages with fewer than 100 image tokens run the original attention"
    assert note not in plans[0].notes and plans[1].notes.count(note) == 1
    converted, chosen = ([stage.seconds for stage in plan.stages] for plan in plans)
    assert chosen[0] == converted[0] and chosen[1] > converted[1] and chosen[2] == converted[2]


def test_plan_detects_the_base_without_removing_weights(high: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, name = denoiser(high)[1], "transformer_blocks.0.attn.to_q.bias"
    weights = {name: torch.zeros_like(model.get_parameter(name))}
    replace_weights_(model, weights, keep_original=True)
    monkeypatch.delattr(FullWeights, "off")
    assert [stage.attention for stage in high.plan(64, 64).stages] == ["original", "converted", "converted"]
    replace_weights_(model, weights, keep_original=False)
    plan = high.plan(64, 64)
    assert [stage.attention for stage in plan.stages] == ["converted"] * 3
    assert any("the base cannot be restored" in note for note in plan.notes)


def test_plan_has_the_base_while_another_thread_is_in_dense(high: Any) -> None:
    plans: list[Plan] = []
    with dense(high):
        worker = threading.Thread(target=lambda: plans.append(high.plan(64, 64)))
        worker.start()
        worker.join()
    assert plans[0].stages[0].attention == "original"


def test_from_pipe_and_plan_refuse_unsupported_parts(high: Any) -> None:
    class Other:
        transformer = torch.nn.Linear(2, 2)

    with pytest.raises(
        lineardit.UnsupportedModelError, match="supports text-to-image pipelines, but a Other takes no prompt"
    ):
        HighResolutionPipeline.from_pipe(Other())

    class Modular(ModularPipeline):
        unet = torch.nn.Linear(2, 2)

    with pytest.raises(lineardit.UnsupportedModelError, match="a Modular is made of blocks"):
        HighResolutionPipeline.from_pipe(Modular.__new__(Modular))
    pipe = converted()
    pipe.transformer.register_to_config(in_channels=24)
    with pytest.raises(lineardit.UnsupportedModelError, match="24 numbers per token, but text-to-image takes 16"):
        HighResolutionPipeline.from_pipe(pipe)
    pipe.register_modules(vae=None)
    with pytest.raises(
        lineardit.UnsupportedModelError, match="AutoencoderKL as the VAE of the FluxPipeline, it has none"
    ):
        HighResolutionPipeline.from_pipe(pipe)
    assert HighResolutionPipeline.from_pipe(converted(native_size=32)).native_size == 256
    with pytest.raises(ValueError, match="native_size must be an integer >= 1 or None, got 0"):
        HighResolutionPipeline.from_pipe(converted(), native_size=0)
    high.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(
        ValueError, match=r"must be a FlowMatchEulerDiscreteScheduler, .* got a FlowMatchHeunDiscreteSch"
    ):
        high.plan(64, 64)


def test_style_lora_is_used_in_a_cascade(high: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    plan = high.plan(32, 32, num_inference_steps=1, settings=FEW_STEPS)
    call: dict[str, Any] = {"plan": plan, "max_sequence_length": 8, "output_type": "latent"}
    plain = high(PROMPT, generator=seeded(), **call).images
    high.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    styled = high(PROMPT, generator=seeded(), **call).images
    high.disable_lora()
    assert torch.equal(high(PROMPT, generator=seeded(), **call).images, plain)
    assert not torch.allclose(styled, plain)


def test_dense_reaches_the_base_after_a_cascade(high: Any) -> None:
    base = build_tiny()
    high(PROMPT, plan=high.plan(32, 32, num_inference_steps=1, settings=FEW_STEPS), max_sequence_length=8)
    stock = FluxPipeline(**high.components)
    stock.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"height": 16, "width": 16, "output_type": "latent", **CALL}
    with dense(high):
        actual, expected = (pipe(PROMPT, generator=seeded(), **call).images for pipe in (stock, base))
    assert torch.equal(actual, expected)
