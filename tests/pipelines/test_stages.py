"""Between the stages of a cascade: texts, callbacks, interruption, and resuming."""

import logging
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from cascade_case import FEW_STEPS, PROMPT, converted, seeded
from PIL import Image

from lineardit import HighResolutionPipeline
from lineardit.pipelines.latents import pack_latents
from lineardit.pipelines.pictures import enlarged
from lineardit.pipelines.plan import Plan, Settings
from lineardit.pipelines.vae import encode_faithfully


@pytest.fixture
def high() -> Any:
    return HighResolutionPipeline.from_pipe(converted())


def test_cascade_resumes_at_a_later_stage(high: Any) -> None:
    plan = high.plan(64, 64, num_inference_steps=1, settings=Settings(steps=1))
    seen: dict[int, Any] = {}

    def keep(_pipe: Any, number: int, outputs: dict[str, Any]) -> None:
        if "latents" in outputs:
            seen[number] = outputs["latents"]

    call: dict[str, Any] = {"plan": plan, "max_sequence_length": 8, "output_type": "latent"}
    uninterrupted = high(PROMPT, generator=seeded(3), callback_on_stage_end=keep, **call).images
    resumed = high(PROMPT, generator=seeded(3), start_latents=seen[0], start_stage=1, **call).images
    assert len(plan.stages) == 3 and torch.equal(resumed, uninterrupted)


def test_start_latents_are_moved_to_the_device(high: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = high.plan(32, 32, num_inference_steps=1, settings=FEW_STEPS)
    seen: list[str] = []

    def decode(_vae: Any, latents: torch.Tensor, **_: Any) -> torch.Tensor:
        seen.append(latents.device.type)
        raise InterruptedError

    monkeypatch.setattr("lineardit.pipelines.stages.decode", decode)
    monkeypatch.setattr(type(high), "_execution_device", torch.device("meta"))
    latents = torch.zeros(1, *high._shape_of_latents(plan.stages[0]))
    with pytest.raises(InterruptedError):
        high(PROMPT, plan=plan, start_latents=latents, start_stage=1, max_sequence_length=8)
    with pytest.raises(InterruptedError):
        high.decode_last(torch.zeros(1, *high._shape_of_latents(plan.stages[-1])), plan)
    assert seen == ["meta", "meta"]


def test_resumed_cascade_passes_on_the_pictures_it_starts_from(high: Any) -> None:
    """A call killed between latents and pictures has not passed them on."""
    plan = high.plan(64, 64, num_inference_steps=1, settings=FEW_STEPS)
    seen: dict[int, Any] = {}
    first = replace(plan, height=16, width=16, stages=plan.stages[:1])
    call: dict[str, Any] = {"max_sequence_length": 8, "output_type": "latent"}
    latents = high(PROMPT, plan=first, generator=seeded(), **call).images

    def stop(pipe: Any, number: int, outputs: dict[str, Any]) -> None:
        seen[number] = outputs["images"]
        pipe._interrupt = True

    call |= {"plan": plan, "start_latents": latents, "start_stage": 1, "callback_on_stage_end": stop}
    images = high(PROMPT, **call).images
    assert list(seen) == [0] and seen[0][0].size == (16, 16)
    assert torch.equal(images, latents)


def test_cascade_takes_negative_prompts_and_makes_several_pictures(high: Any) -> None:
    plan = high.plan(32, 32, num_inference_steps=1, settings=FEW_STEPS)
    call: dict[str, Any] = {"plan": plan, "max_sequence_length": 8, "output_type": "np"}
    plain = high(PROMPT, num_images_per_prompt=2, generator=seeded(), **call).images
    guided = high(
        PROMPT, negative_prompt="b", true_cfg_scale=3.0, num_images_per_prompt=2, generator=seeded(), **call
    ).images
    assert plain.shape == guided.shape == (2, 32, 32, 3)
    assert not numpy.allclose(plain[0], plain[1]) and not numpy.allclose(plain, guided)
    two = {**call, "prompt": [PROMPT] * 2, "true_cfg_scale": 3.0}
    each, broadcast = (high(negative_prompt=text, generator=seeded(), **two).images for text in (["b"] * 2, "b"))
    assert numpy.array_equal(broadcast, each)


def test_text_is_encoded_once(high: Any) -> None:
    plan = high.plan(64, 64, num_inference_steps=1, settings=Settings(steps=1))
    seen: list[int] = []
    high.text_encoder_2.register_forward_hook(lambda *_: seen.append(0))
    call: dict[str, Any] = {"negative_prompt": "b", "true_cfg_scale": 2.0, "max_sequence_length": 8}
    high(PROMPT, plan=plan, **call)
    assert len(plan.stages) == 3 and len(seen) == 2  # the prompt, and the negative one
    high(PROMPT, plan=plan, **call)
    assert len(seen) == 4 and "encode_prompt" not in vars(high)


def test_interrupt_stops_after_the_step_and_logs_the_size(high: Any, caplog: pytest.LogCaptureFixture) -> None:
    plan = high.plan(64, 64, num_inference_steps=2, settings=FEW_STEPS)
    steps: list[int] = []

    def stop(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        steps.append(step)
        pipe._interrupt = True
        return {}

    out = high(PROMPT, plan=plan, generator=seeded(), max_sequence_length=8, callback_on_step_end=stop).images[0]
    assert steps == [0] and out.size == (16, 16)
    assert "interrupted in stage 1 of 3: the result has 16x16 pixels" in caplog.text


def test_num_inference_steps_apply_to_every_stage_of_an_enlargement(high: Any) -> None:
    plan = high.plan(64, 64, num_inference_steps=3, enlarge=True)
    assert [stage.steps for stage in plan.stages] == [3] * len(plan.stages)
    steps: list[int] = []

    def count(_pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        steps.append(step)
        return {}

    call: dict[str, Any] = {"max_sequence_length": 8, "callback_on_step_end": count, "generator": seeded()}
    high(PROMPT, image=Image.new("RGB", (16, 16)), height=32, width=32, num_inference_steps=3, **call)
    assert steps == [0, 1, 2]


def test_callbacks_can_read_the_stage(high: Any) -> None:
    plan = high.plan(64, 64, num_inference_steps=2, settings=FEW_STEPS)
    seen: list[tuple[int | None, Any]] = []

    def record(pipe: Any, *_: Any) -> dict[str, Any]:
        seen.append((pipe.stage_number, pipe.stage))
        return {}

    high(PROMPT, plan=plan, generator=seeded(), max_sequence_length=8, callback_on_step_end=record)
    assert seen == [(number, stage) for number, stage in enumerate(plan.stages) for _ in range(stage.steps)]
    assert high.stage is None and high.stage_number is None


def test_stages_log_the_kernel_that_runs(high: Any, caplog: pytest.LogCaptureFixture) -> None:
    plan = high.plan(64, 64, num_inference_steps=1, settings=FEW_STEPS)
    with caplog.at_level(logging.INFO):
        high(PROMPT, plan=plan, negative_prompt="b", true_cfg_scale=2.0, max_sequence_length=8)
    messages = [record.message for record in caplog.records if record.message.startswith("stage")]
    assert [line.partition(": ")[0] for line in messages] == [
        "stage 1 of 3, 16x16, original attention",
        "stage 2 of 3, 32x32, converted attention, kernel",
        "stage 2 of 3, 32x32, converted attention",
        "stage 3 of 3, 64x64, converted attention, kernel",
        "stage 3 of 3, 64x64, converted attention",
    ]
    assert messages[3].endswith("kernel: masked")


def test_stage_starts_from_the_sharpened_picture(high: Any) -> None:
    picture = Image.effect_noise((16, 16), 60).convert("RGB")
    (stage,) = high.plan(32, 32, enlarge=True, settings=Settings(steps=1, strength=1e-4, follow=0)).stages
    plan = Plan(height=32, width=32, stages=(stage,))
    result = high(PROMPT, image=picture, plan=plan, generator=seeded(), max_sequence_length=8, output_type="latent")
    errors = []
    for sharpen in (stage.sharpen, 0.0):
        pixels = high.image_processor.preprocess(enlarged(picture, 32, 32, sharpen))
        expected = pack_latents(encode_faithfully(high.vae, pixels, tile=None))
        errors.append(float((result.images - expected).abs().max()))
    assert stage.sharpen == 1 and errors[0] < 1e-2 < errors[1]
