"""Evaluation of a student against its teacher: the report, resuming, and refused input."""

import gc
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FluxPipeline
from peft import LoraConfig
from PIL import Image
from tiny_distill import PROMPTS, build_tiny

from lineardit import Clear, dense, linearize_, set_impl_
from lineardit.distill import cost
from lineardit.distill.cost import PROMPT, paired_step_seconds, picture_peak_in_subprocess, resident_peak
from lineardit.distill.data import TeacherSamples
from lineardit.distill.evaluate import ByName, evaluate
from lineardit.distill.pictures import PictureSettings, digest, make_pictures
from lineardit.distill.prepare import prepare
from lineardit.linearize.locks import folder_lock

SETTINGS = PictureSettings(height=24, width=32, steps=2, max_sequence_length=8, batch_size=2)
THREE = PROMPTS[:3]


@pytest.fixture
def student() -> FluxPipeline:
    pipe = build_tiny()
    linearize_(pipe, Clear(radius=2))
    return pipe


def forwards(pipe: FluxPipeline) -> list[int]:
    """A list that grows by one element with each forward of the transformer."""
    calls: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def judge_red(prompt: str, image: Image.Image) -> Mapping[str, tuple[int, int]]:
    """A judge that scores one of two right for prompts with "red", and does not judge others."""
    return {"red": (1, 2)} if "red" in prompt else {}


def test_evaluate_compares_the_pipelines_own_latents(pipe: FluxPipeline, student: FluxPipeline, tmp_path: Path) -> None:
    report = evaluate(pipe, student, THREE, tmp_path / "out", settings=SETTINGS, judge=judge_red)
    call: dict[str, Any] = {"height": 24, "width": 32, "num_inference_steps": 2, "max_sequence_length": 8}
    errors = []
    for index, prompt in enumerate(THREE):
        both = [
            pipeline(prompt, generator=torch.Generator().manual_seed(index), output_type="latent", **call).images
            for pipeline in (pipe, student)
        ]
        errors.append((both[0] - both[1]).square().mean())
    assert report.latent_mse == pytest.approx(float(torch.stack(errors).mean()), rel=1e-3)
    assert report.latent_mse > 0
    assert report.pictures == 3
    red = sum("red" in prompt for prompt in THREE)
    assert report.teacher.scores == report.student.scores == {"red": (red, 2 * red)}
    assert report.differences["red"].difference == 0
    assert "original" in report.teacher.attention
    assert "Clear(radius=2" in report.student.attention
    assert report.teacher.peak_gib is None
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["latent_mse"] == report.latent_mse
    with Image.open(report.sheet) as sheet:
        assert sheet.width > 3 * 32
        assert sheet.height > 3 * 24


def test_default_size_of_samples_and_pictures_is_the_models_own(pipe: FluxPipeline, tmp_path: Path) -> None:
    pipe.vae.register_to_config(sample_size=16)
    samples = TeacherSamples(prepare(pipe, PROMPTS[:2], tmp_path / "samples", steps=1, max_sequence_length=8))
    assert [(sample.height, sample.width) for sample in samples.samples] == [(16, 16)] * 2
    report = evaluate(pipe, pipe, PROMPTS[:1], tmp_path / "report", settings=PictureSettings(steps=1), memory=False)
    assert (report.settings.height, report.settings.width) == (16, 16)


def test_evaluate_finds_no_difference_to_itself(pipe: FluxPipeline, tmp_path: Path) -> None:
    report = evaluate(pipe, pipe, THREE[:1], tmp_path, settings=SETTINGS)
    assert (report.latent_mse, report.psnr) == (0, float("inf"))
    assert report.ssim == pytest.approx(1)
    assert report.to_dict()["psnr"] is None


def test_make_pictures_resumes_where_it_stopped(pipe: FluxPipeline, tmp_path: Path) -> None:
    first = make_pictures(pipe, THREE, tmp_path, SETTINGS)
    calls = forwards(pipe)
    (deleted,) = tmp_path.glob("*/000001.safetensors")
    deleted.unlink()
    again = make_pictures(pipe, THREE, tmp_path, SETTINGS)
    assert len(calls) == SETTINGS.steps
    for before, after in zip(first.latents, again.latents, strict=True):
        torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)


def test_make_pictures_keeps_latents_that_could_not_be_decoded(
    pipe: FluxPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_pictures(pipe, THREE, tmp_path / "whole", SETTINGS)

    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(pipe.vae, "decode", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            make_pictures(pipe, THREE, tmp_path / "two", SETTINGS)
    assert len(list((tmp_path / "two").glob("*/*.safetensors"))) == SETTINGS.batch_size
    calls = forwards(pipe)
    again = make_pictures(pipe, THREE, tmp_path / "two", SETTINGS)
    assert len(calls) == SETTINGS.steps  # only the batch that had not been started
    assert [image.tobytes() for image in again.images] == [image.tobytes() for image in first.images]


@pytest.mark.parametrize("damaged", ["000001.png", "000001.safetensors"])
def test_make_pictures_replaces_damaged_files(pipe: FluxPipeline, tmp_path: Path, damaged: str) -> None:
    first = make_pictures(pipe, THREE, tmp_path, SETTINGS)
    (file,) = tmp_path.glob(f"*/{damaged}")
    file.write_bytes(file.read_bytes()[:-30])
    again = make_pictures(pipe, THREE, tmp_path, SETTINGS)
    assert [image.size for image in again.images] == [image.size for image in first.images]
    assert again.images[0].tobytes() == first.images[0].tobytes()


def test_make_pictures_refuses_latents_that_are_not_finite(pipe: FluxPipeline, tmp_path: Path) -> None:
    pipe.transformer.proj_out.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"latents that are not finite, in torch.float32: load it in another dtype"):
        make_pictures(pipe, THREE, tmp_path, SETTINGS)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_evaluate_refuses_a_damaged_report(pipe: FluxPipeline, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"question": {"tea')
    with pytest.raises(ValueError, match=r"report.json is damaged"):
        evaluate(pipe, pipe, THREE, tmp_path, settings=SETTINGS, memory=False)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a report with different teacher, student, prompts, settings"):
        evaluate(pipe, pipe, THREE, tmp_path, settings=SETTINGS, memory=False)


def test_make_pictures_replaces_the_picture_of_a_changed_prompt(pipe: FluxPipeline, tmp_path: Path) -> None:
    make_pictures(pipe, THREE, tmp_path, SETTINGS)
    calls = forwards(pipe)
    make_pictures(pipe, [THREE[0], "something else", THREE[2]], tmp_path, SETTINGS)
    assert len(calls) == SETTINGS.steps


@pytest.mark.parametrize("stochastic", [False, True])
def test_make_pictures_does_not_depend_on_the_batch(pipe: FluxPipeline, tmp_path: Path, stochastic: bool) -> None:
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, stochastic_sampling=stochastic)
    single = PictureSettings(**vars(SETTINGS) | {"batch_size": 1})
    one_by_one, together = (
        make_pictures(pipe, THREE, tmp_path / str(settings), settings) for settings in (single, SETTINGS)
    )
    for a, b in zip(one_by_one.latents, together.latents, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_digest_changes_with_what_changes_pictures(pipe: FluxPipeline, student: FluxPipeline) -> None:
    other_batch = PictureSettings(**vars(SETTINGS) | {"batch_size": 7})
    assert digest(pipe, SETTINGS) == digest(pipe, other_batch)
    other = build_tiny()
    linearize_(other, Clear(radius=3))
    changed = {digest(pipeline, SETTINGS) for pipeline in (pipe, student, other)}
    linearize_(other, Clear(radius=3), dense_below=100)
    changed.add(digest(other, SETTINGS))
    set_impl_(other, "tiled")  # a forced implementation runs at every size
    assert digest(other, SETTINGS) in changed
    linearize_(other, Clear(radius=3))
    changed.add(digest(pipe, PictureSettings(**vars(SETTINGS) | {"seed": 1})))
    with dense(student):
        changed.add(digest(student, SETTINGS))
    other.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="style")
    for strength in (0.2, 0.8):
        other.set_adapters("style", strength)
        changed.add(digest(other, SETTINGS))
    other.disable_lora()
    changed.add(digest(other, SETTINGS))
    pipe.text_encoder_2.shared.weight.data.add_(1)
    changed.add(digest(pipe, SETTINGS))
    assert len(changed) == 10


def test_evaluate_keeps_a_report_of_other_settings_unless_overwritten(pipe: FluxPipeline, tmp_path: Path) -> None:
    evaluate(pipe, pipe, THREE[:1], tmp_path, settings=SETTINGS)
    before = (tmp_path / "report.json").read_text()
    other = PictureSettings(**vars(SETTINGS) | {"steps": 1})
    with pytest.raises(ValueError, match="holds a report with different prompts, settings: name another folder"):
        evaluate(pipe, pipe, THREE[:2], tmp_path, settings=other)
    assert (tmp_path / "report.json").read_text() == before
    assert evaluate(pipe, pipe, THREE[:2], tmp_path, settings=other, overwrite=True).pictures == 2


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "prompts must not be empty"),
        (THREE, {"height": 26}, "multiples of 4 pixels for this model, got 32x26; nearest: 32x24 and 32x28"),
    ],
)
def test_evaluate_refuses_bad_input(
    pipe: FluxPipeline, tmp_path: Path, prompts: list[str], settings: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(pipe, pipe, prompts, tmp_path, settings=PictureSettings(**vars(SETTINGS) | settings))
    assert not (tmp_path / "report.json").exists()


def test_evaluate_refuses_a_sheet_without_pictures(pipe: FluxPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shown must be >= 1, got 0"):
        evaluate(pipe, pipe, THREE, tmp_path, settings=SETTINGS, shown=0)
    assert not list(tmp_path.iterdir())


def test_evaluate_refuses_a_folder_of_other_files(pipe: FluxPipeline, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no evaluation"):
        evaluate(pipe, pipe, THREE, tmp_path, settings=SETTINGS)


def test_evaluate_locks_its_folder(pipe: FluxPipeline, tmp_path: Path) -> None:
    with folder_lock(tmp_path / "out"), pytest.raises(ValueError, match=r"another process is using .*out"):
        evaluate(pipe, pipe, THREE[:1], tmp_path / "out", settings=SETTINGS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").touch()  # left by a process killed before its first picture
    evaluate(pipe, pipe, THREE[:1], tmp_path / "out", settings=SETTINGS)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.json", "pictures", "teacher-student-difference.png"}


def test_picture_settings_refuse_zero_steps() -> None:
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        PictureSettings(height=8, width=8, steps=0)


def test_digest_covers_weights_offloaded_by_accelerate() -> None:
    """Sequential offload leaves all parameters on the meta device between forwards."""
    one, other = build_tiny(), build_tiny()
    in_memory = digest(one, SETTINGS.with_defaults(one))
    with torch.no_grad():
        other.transformer.proj_out.weight.add_(1)
    for pipe in (one, other):
        cpu_offload(pipe.transformer, torch.device("cpu"))
        assert pipe.transformer.proj_out.weight.is_meta
    assert digest(one, SETTINGS.with_defaults(one)) == in_memory != digest(other, SETTINGS.with_defaults(other))


def test_costs_are_measured_on_the_pipelines_own_gpu(pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the current device, which is cuda:0 whichever device the pipeline is on."""
    device, devices = torch.device("cuda:1"), []
    monkeypatch.setattr(FluxPipeline, "device", device)
    monkeypatch.setattr(cost, "_draw", lambda *_: None)
    monkeypatch.setattr(cost, "first_call", lambda *_, **__: {})
    monkeypatch.setattr(cost, "predict", lambda *_: None)
    monkeypatch.setattr(torch.accelerator, "synchronize", devices.append)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", devices.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: devices.append(device) or 2**30)
    cost.step_call(pipe, SETTINGS)()
    assert cost.picture_peak(pipe, SETTINGS) == 1
    assert devices == 3 * [device]


def test_paired_step_seconds_alternates_teacher_and_student(pipe: FluxPipeline, student: FluxPipeline) -> None:
    order: list[str] = []
    for name, one in (("teacher", pipe), ("student", student)):
        one.transformer.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    pairs = paired_step_seconds(pipe, student, SETTINGS, pairs=2)
    assert order == ["teacher", "student"] * 3
    assert all(seconds > 0 for pair in pairs for seconds in pair)


@pytest.mark.parametrize("kernel_counts", [True, False])
def test_resident_peak_includes_memory_freed_before_the_end(
    kernel_counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel_counts:
        monkeypatch.setattr(cost, "_reset_high_water_mark", lambda: False)
    elif not cost._reset_high_water_mark():
        pytest.skip("only Linux keeps a mark of resident memory")
    gc.collect()  # garbage of earlier tests, freed meanwhile, would hide the block
    with resident_peak() as peak:
        block = torch.ones(2**24)  # 64 MiB
        assert block.sum() > 0
        if not kernel_counts:
            time.sleep(0.2)  # seconds: long enough for the sampling thread on a busy machine
        del block
    assert 60 * 2**20 < peak[0] < 200 * 2**20


@pytest.mark.slow
def test_picture_peak_in_subprocess_grows_with_the_picture(base: Path) -> None:
    source = ByName(name=str(base)).open_arguments()
    small, large = (
        picture_peak_in_subprocess(source, PictureSettings(height=side, width=side, max_sequence_length=8))
        for side in (32, 256)
    )
    assert 0 <= small < large


def test_cost_prompt_is_in_the_small_models_vocabulary(pipe: FluxPipeline) -> None:
    assert pipe.tokenizer_2.unk_token_id not in pipe.tokenizer_2(PROMPT).input_ids
