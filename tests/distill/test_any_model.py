"""Distillation from kept calls of the denoiser, for models without a row in `latent_functions.py`."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from kept_case import config_of, kept
from peft import LoraConfig
from prompted import prompted, size_of
from tiny_distill import PROMPTS, SIZES, fork_run, loss_rows, write_config
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor
from whole_pipelines import WHOLE

from lineardit import Clear, linearize_, load_adapter_
from lineardit.distill import train
from lineardit.distill.batches import Batches
from lineardit.distill.calls import pack, sample_calls, unpack
from lineardit.distill.config import DistillConfig
from lineardit.distill.evaluate import evaluate
from lineardit.distill.identity import fingerprint, main_dtype
from lineardit.distill.pictures import PictureSettings
from lineardit.linearize.convert import swapped
from lineardit.linearize.measures.recording import Prediction, predict, prediction_of, recording
from lineardit.linearize.networks import denoiser
from lineardit.linearize.weights.training import projection_names
from tiny_models import MODELS, build
from tiny_stock import STOCK

COMMON = ("sd3", "pixart-sigma", "sd", "sdxl", "qwen-image", "flux2")
KEEP_OBJECTS = ("glm-image", "qwen-image-21")  # their arguments hold cache objects for a reference
TAKE_OTHERS = ("dit", "qwen-image-layered")  # take no prompt, or no size
DRAW_AT_RANDOM = ("sd3-controlnet", "hunyuan-dit-controlnet")  # sample the control latents without the generator
NAMES = [
    pytest.param(name, marks=[] if name in COMMON else pytest.mark.slow)
    for name in STOCK
    if name not in KEEP_OBJECTS + TAKE_OTHERS
]
MakeConfig = Callable[..., DistillConfig]


@pytest.mark.parametrize("name", NAMES)
def test_kept_calls_reproduce_the_pipelines_outputs(name: str, tmp_path: Path) -> None:
    pipe, (height, width) = prompted(name), size_of(name)
    samples = kept(pipe, tmp_path / "samples", (height, width))
    model = denoiser(pipe)[1]
    with recording(model) as recorded:
        generator = torch.Generator().manual_seed(1)
        pipe(
            prompt=PROMPTS[1],
            height=height,
            width=width,
            num_inference_steps=2,
            generator=generator,
            output_type="latent",
        )
    with torch.no_grad():
        again = [predict(model, samples.call(1, number)) for number in range(2)]
    if name in DRAW_AT_RANDOM:
        assert [one.shape for one in again] == [one.output.shape for one in sample_calls(recorded, 2, 1)]
        return
    # tensors read from disk have other strides, with which sums may run in another order
    places = [[torch.allclose(one.output, two, atol=1e-5) for one in recorded].index(True) for two in again]
    assert places[0] < len(recorded) / 2 <= places[1]


@pytest.mark.parametrize("name", NAMES)
def test_student_learns_from_kept_calls(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = prompted(name)
    samples = kept(pipe, tmp_path / "samples", size_of(name))
    student = copy.deepcopy(pipe)
    monkeypatch.setattr(train, "load_teacher", lambda _: student)
    adapter = train.distill(config_of(tmp_path))
    rows = loss_rows(tmp_path / "run")
    assert rows[1]["layerwise"] < rows[0]["layerwise"]
    assert rows[-1]["attention"] < rows[2]["attention"]
    load_adapter_(pipe, adapter)
    denoiser(student)[1].eval()
    with torch.no_grad():
        one, two = (predict(denoiser(one)[1], samples.call(0, 0)) for one in (pipe, student))
    assert torch.allclose(one, two, atol=1e-5)
    assert (tmp_path / "run" / "validation.csv").read_text().startswith("step,prediction_error")


@pytest.mark.parametrize("name", COMMON)
def test_student_learns_from_kept_calls_in_bfloat16(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = prompted(name)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.to(torch.bfloat16)
    kept(pipe, tmp_path / "samples", size_of(name))
    monkeypatch.setattr(train, "load_teacher", lambda _: pipe)
    run = {"mixed_precision": "bf16", "gradient_checkpointing": True}
    train.distill(config_of(tmp_path, dtype="bfloat16", run=run))
    rows = loss_rows(tmp_path / "run")
    assert rows[-1]["attention"] < rows[2]["attention"]


def test_gradient_checkpointing_supports_blocks_called_by_keyword(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = prompted("hunyuan-image")
    kept(pipe, tmp_path / "samples", size_of("hunyuan-image"))
    for folder, on in (("plain", False), ("again", True)):
        student = copy.deepcopy(pipe)
        monkeypatch.setattr(train, "load_teacher", lambda _, student=student: student)
        run = {"steps": 1, "gradient_checkpointing": on, "directory": str(tmp_path / folder)}
        train.distill(config_of(tmp_path, layerwise={"steps": 0}, run=run))
    plain, again = (loss_rows(tmp_path / folder)[0] for folder in ("plain", "again"))
    assert {**again, "seconds": 0} == pytest.approx({**plain, "seconds": 0}, rel=1e-5)


def test_gradient_checkpointing_unsupported_by_diffusers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = prompted("hunyuan-dit")
    kept(pipe, tmp_path / "samples", size_of("hunyuan-dit"))
    monkeypatch.setattr(train, "load_teacher", lambda _: pipe)
    with pytest.raises(ValueError, match=r"^run.gradient_checkpointing must be false for a HunyuanDiT2DModel"):
        train.distill(config_of(tmp_path, run={"gradient_checkpointing": True}))
    assert not (tmp_path / "run" / "run.json").exists()


def test_kept_calls_give_the_same_losses_in_two_processes(tmp_path: Path) -> None:
    """Includes text projections; those of the last block get a gradient from the attention loss only."""
    pipe = prompted("qwen-image")
    kept(pipe, tmp_path / "samples", size_of("qwen-image"))
    pipe.save_pretrained(tmp_path / "base")
    tables: dict[str, Any] = {"trained": {"rank": 2, "projections": ["to_q", "add_q_proj", "to_add_out"]}}
    configs = [
        config_of(tmp_path, str(tmp_path / "base"), run={"directory": str(tmp_path / name)}, **tables)
        for name in ("one", "two")
    ]
    process = fork_run(write_config(configs[1], tmp_path / "two.toml"), processes=2)
    train.distill(configs[0])
    assert process.wait() == 0, process.stderr.read().decode()
    for row, other in zip(loss_rows(tmp_path / "one"), loss_rows(tmp_path / "two"), strict=True):
        assert {**other, "seconds": 0} == pytest.approx({**row, "seconds": 0}, rel=1e-5)


def test_flux_learns_from_kept_calls(base: Path, pipe: FluxPipeline, tmp_path: Path) -> None:
    samples = kept(pipe, tmp_path / "samples", SIZES[0], max_sequence_length=8)
    assert samples.calls == 2
    guided = kept(
        pipe,
        tmp_path / "guided",
        SIZES[0],
        max_sequence_length=8,
        calls=4,
        arguments={"negative_prompt": PROMPTS[3], "true_cfg_scale": 2.0},
    )
    prompted, negative = (guided.call(0, number)["encoder_hidden_states"] for number in range(2))
    assert torch.equal(prompted, samples.call(0, 0)["encoder_hidden_states"])
    assert not torch.equal(prompted, negative)
    train.distill(config_of(tmp_path, str(base)))
    rows = loss_rows(tmp_path / "run")
    assert rows[-1]["prediction"] > 0
    assert rows[-1]["attention"] < rows[2]["attention"]


def test_share_rounded_up_to_one_takes_the_last_call(tmp_path: Path) -> None:
    samples = kept(prompted("sd3"), tmp_path / "samples", size_of("sd3"))
    batches = SimpleNamespace(samples=samples)
    (part,) = Batches._kept_calls(batches, [0], torch.tensor([1.0]))  # type: ignore[arg-type]
    assert torch.equal(part.arguments["hidden_states"], samples.call(0, 1)["hidden_states"])


def test_prediction_of_drops_learned_variance_channels() -> None:
    output = torch.rand(2, 8, 4, 6)
    for model in (build("pixart", out_channels=8), build("hunyuan-dit"), build("lumina-next", learn_sigma=True)):
        assert model.config.in_channels == 4
        assert torch.equal(prediction_of(model, (output,)), output[:, :4])
    assert prediction_of(build("sd3"), (output,)) is output


def test_main_dtype_is_that_of_most_weights() -> None:
    pipe = prompted("wan")
    assert main_dtype(pipe.transformer) == torch.float32
    pipe.transformer.to(torch.bfloat16)
    pipe.transformer.scale_shift_table.data = pipe.transformer.scale_shift_table.data.float()
    assert next(pipe.transformer.parameters()).dtype == torch.float32
    assert main_dtype(pipe.transformer) == torch.bfloat16
    assert fingerprint(pipe.transformer) != fingerprint(prompted("wan").transformer)


def test_projection_names_ignore_a_style_lora() -> None:
    model = build("flux")
    linearize_(model, Clear(radius=2))
    names = projection_names(model, None)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0", "proj_out"]), "style")
    assert projection_names(model, None) == names


def test_load_teacher_leaves_out_the_safety_checker(tmp_path: Path) -> None:
    pipe = WHOLE["sd"][0]()
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(vision_config={**vision, "image_size": 16, "patch_size": 8}, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    pipe.register_modules(safety_checker=checker, feature_extractor=CLIPImageProcessor())
    pipe.save_pretrained(tmp_path / "base")
    base = train.load_teacher(config_of(tmp_path, str(tmp_path / "base")).base)
    assert base.unet is not None and base.safety_checker is None


def test_pipeline_arguments_are_stored_as_json_values(tmp_path: Path) -> None:
    pipe, size = prompted("sdxl"), size_of("sdxl")
    pairs = {"original_size": (64, 48)}
    assert kept(pipe, tmp_path / "samples", size, arguments=pairs).settings["arguments"] == {"original_size": [64, 48]}
    kept(pipe, tmp_path / "samples", size, arguments=pairs)  # already complete
    with pytest.raises(ValueError, match="arguments must be JSON values"):
        kept(pipe, tmp_path / "more", size, arguments={"original_size": torch.ones(2)})


def test_prepare_refuses_a_pipeline_that_takes_no_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DiTPipeline takes no height"):
        kept(prompted("dit"), tmp_path / "samples", (64, 64))


def test_unpack_inverts_pack() -> None:
    text = torch.ones(2, 3, dtype=torch.bfloat16)
    calls = [
        {"x": torch.rand(2, 2), "text": text, "more": {"ids": [(1, 2.5), None], "on": True, "masks": [text, text]}},
        {"x": torch.arange(3), "text": text, "more": {"name": "a", "empty": ()}},
    ]
    tensors, written = pack(calls, "00000007")
    assert len(tensors) == 3  # the shared text is stored once
    for number, call in enumerate(calls):
        again = unpack(written, number, lambda key: tensors[f"00000007.{key}"])
        assert torch.equal(again.pop("x"), call["x"])
        assert again.pop("text") is text
        assert again["more"] == call["more"]


@pytest.mark.parametrize(("total", "count"), [(28, 4), (7, 3), (2, 2), (2, 5)])
def test_sample_calls_takes_one_call_of_each_part(total: int, count: int) -> None:
    empty = torch.empty(0)
    predictions = [Prediction(index=index, arguments={}, output=empty) for index in range(total)]
    for seed in range(20):
        indices = [one.index for one in sample_calls(predictions, count, seed)]
        parts = min(total, count)
        assert len(set(indices)) == len(indices) == parts
        assert all(part * total // parts <= index < (part + 1) * total // parts for part, index in enumerate(indices))


@pytest.mark.parametrize("name", MODELS)
def test_projection_names_cover_every_converted_module(name: str) -> None:
    model = build(name)
    linearize_(model, Clear(radius=2))
    names = projection_names(model, None)
    assert all(any(one.startswith(f"{module}.") for one in names) for module in swapped(model))
    assert not [one for one in names if "add_" in one or "txt_" in one or "linear_kernel" in one]


def test_evaluate_supports_pipelines_other_than_flux(tmp_path: Path) -> None:
    pipe, (height, width) = prompted("pixart-sigma"), size_of("pixart-sigma")
    settings = PictureSettings(height=height, width=width, steps=2, batch_size=2)
    same = evaluate(pipe, copy.deepcopy(pipe), PROMPTS[:2], tmp_path / "same", settings=settings)
    assert same.latent_mse == 0 and same.ssim == pytest.approx(1)
    assert same.student.seconds_per_step > 0
    student = copy.deepcopy(pipe)
    linearize_(student, Clear(radius=1.5))
    report = evaluate(pipe, student, PROMPTS[:2], tmp_path / "other", settings=settings)
    assert report.latent_mse > 0
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "other" / "pictures").rglob("*.png")}
    assert len(before) == 4
    evaluate(pipe, student, PROMPTS[:2], tmp_path / "other", settings=settings)
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_evaluate_refuses_a_pipeline_that_makes_no_pictures(tmp_path: Path) -> None:
    pipe, (height, width) = prompted("chronoedit"), size_of("chronoedit")
    settings = PictureSettings(height=height, width=width, steps=2)
    with pytest.raises(ValueError, match="does not return one picture per prompt"):
        evaluate(pipe, pipe, PROMPTS[:2], tmp_path, settings=settings)
