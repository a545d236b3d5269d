"""`generate`: pictures and their metadata in files, resuming, and refused input."""

import logging
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors import SafetensorError, safe_open
from tiny_distill import build_tiny

from lineardit import Clear, linearize_
from lineardit.pipelines import files
from lineardit.pipelines.generate import generate
from lineardit.pipelines.placement import place_
from lineardit.pipelines.truncated_prompts import warn_truncated_prompts

PROMPTS = ["a red circle", "a blue square", "a green cross"]
CALL: dict[str, Any] = {"size": (24, 32), "steps": 2, "max_sequence_length": 8}


@pytest.fixture
def pipe() -> FluxPipeline:
    pipe = build_tiny()
    linearize_(pipe, Clear(radius=2))
    return pipe


def expected(pipe: FluxPipeline, prompt: str, seed: int, output_type: str = "pil") -> Any:
    """What the pipeline itself makes."""
    generator = torch.Generator("cpu").manual_seed(seed)
    call = {"height": 24, "width": 32, "num_inference_steps": 2, "max_sequence_length": 8, "output_type": output_type}
    return pipe(prompt, generator=generator, **call).images[0]


def pixels(path: Path) -> numpy.ndarray:
    with Image.open(path) as image:
        return numpy.asarray(image, numpy.int16)


def test_generate_writes_the_pipelines_picture_and_its_settings(pipe: FluxPipeline, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.png"
    about = {"model": "tiny", "adapter": "kreuz-förmig"}
    assert generate(pipe, PROMPTS[:1], out, **CALL, seed=5, guidance=3.0, about=about) == [out]
    assert numpy.array_equal(pixels(out), numpy.asarray(expected(pipe, PROMPTS[0], 5)))
    with Image.open(out) as image:
        assert image.info == {
            "prompt": PROMPTS[0],
            "seed": "5",
            "size": "32x24",
            "steps": "2",
            "guidance": "3.0",
            "max_sequence_length": "8",
            **about,
        }
    assert [path.name for path in out.parent.iterdir()] == ["out.png"]


def test_generate_seeds_each_picture_whatever_the_batch(pipe: FluxPipeline, tmp_path: Path) -> None:
    files = generate(pipe, PROMPTS, tmp_path / "pictures", **CALL, seed=3, batch_size=2)
    assert [file.name for file in files] == ["000.png", "001.png", "002.png"]
    for index, file in enumerate(files):
        assert abs(pixels(file) - numpy.asarray(expected(pipe, PROMPTS[index], 3 + index))).max() <= 1


def test_generate_makes_the_pipelines_default_size(pipe: FluxPipeline, tmp_path: Path) -> None:
    pipe.vae.register_to_config(sample_size=16)
    (file,) = generate(pipe, PROMPTS[:1], tmp_path / "out.png", steps=1, max_sequence_length=8)
    with Image.open(file) as image:
        assert (image.size, image.info["size"]) == ((16, 16), "16x16")


def test_generate_saves_latents_before_it_decodes(
    pipe: FluxPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("decoder")

    expected_latents = expected(pipe, PROMPTS[0], 0, "latent")
    monkeypatch.setattr(pipe.vae, "decode", fail)
    with pytest.raises(torch.OutOfMemoryError):
        generate(pipe, PROMPTS[:1], tmp_path / "out.png", **CALL)
    latents = tmp_path / "out.latents.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == [latents.name]
    assert str(latents) in caplog.text
    with safe_open(latents, framework="pt") as file:
        assert torch.equal(file.get_tensor("latents")[0], expected_latents)
        assert file.metadata()["prompt"] == PROMPTS[0]
    monkeypatch.undo()
    generate(pipe, PROMPTS[:1], tmp_path / "out.png", **CALL)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.parametrize("cascade", [False, True])
def test_generate_makes_the_picture_if_latents_cannot_be_saved(
    pipe: FluxPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cascade: bool
) -> None:
    pipe.vae.register_to_config(sample_size=16)
    monkeypatch.setattr(files, "save_file", Mock(side_effect=SafetensorError("No space left on device")))
    generate(pipe, PROMPTS[:1], tmp_path / "out.png", **CALL | {"size": (48, 48)}, cascade=cascade)
    assert pixels(tmp_path / "out.png").shape == (48, 48, 3)
    assert not list(tmp_path.rglob("*.safetensors"))
    message = (
        "cannot be saved, but the picture is still made: .*/out.latents.safetensors cannot be written: No space left"
    )
    assert re.search(message, caplog.text)


@pytest.mark.parametrize("cascade", [False, True])
def test_generate_refuses_latents_that_are_not_finite(pipe: FluxPipeline, tmp_path: Path, cascade: bool) -> None:
    pipe.transformer.proj_out.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"latents that are not finite, in torch.float32: load it in another dtype"):
        generate(pipe, PROMPTS[:1], tmp_path / "out.png", **CALL, cascade=cascade)
    assert not list(tmp_path.rglob("*.png")) + list(tmp_path.rglob("*.safetensors"))


def test_generate_resumes_where_it_stopped(pipe: FluxPipeline, tmp_path: Path) -> None:
    files = generate(pipe, PROMPTS, tmp_path / "pictures", **CALL)
    stamps = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    generate(pipe, PROMPTS, tmp_path / "pictures", **CALL)
    assert [file.stat().st_mtime_ns == stamp for file, stamp in zip(files, stamps, strict=True)] == [True, False, True]


def test_generate_keeps_pictures_made_with_other_settings(pipe: FluxPipeline, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    files = generate(pipe, PROMPTS, folder, **CALL)
    before = files[0].read_bytes()
    with pytest.raises(ValueError, match=r"000.png exists, was made with other settings, and is kept: name another"):
        generate(pipe, PROMPTS, folder, **CALL, seed=1)
    assert files[0].read_bytes() == before
    generate(pipe, PROMPTS, folder, **CALL, seed=1, overwrite=True)
    assert files[0].read_bytes() != before


def test_generate_keeps_an_existing_file(pipe: FluxPipeline, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    out.write_text("mine")
    with pytest.raises(ValueError, match=r"out.png exists, was made with other settings, and is kept"):
        generate(pipe, PROMPTS[:1], out, **CALL)
    assert out.read_text() == "mine"
    generate(pipe, PROMPTS[:1], out, **CALL, overwrite=True)
    assert pixels(out).shape == (24, 32, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"size": (26, 33)},
            "must be multiples of 4 pixels for this model, got 33x26; nearest: 32x24 and 36x28; a cascade",
        ),
        ({"size": (2, 32)}, "got 32x2; nearest: 32x4"),
        ({"steps": 0}, "steps and batch_size must be >= 1, seed >= 0, got 0, 1 and 0"),
        ({"steps": 10_001}, "steps must be <= 10000, got 10001"),
        ({"batch_size": 0}, "got 2, 0 and 0"),
        ({"seed": -1}, "got 2, 1 and -1"),
        ({"seed": 2**64}, f"and {2**64}"),
        ({"part": (3, 2)}, r"part must be \(i, n\) with 1 <= i <= n, got \(3, 2\)"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": ["a", " "]}, "none may be empty"),
        ({"prompts": PROMPTS}, "output must be a folder for 3 pictures, got the file"),
        ({"output": "out.jpg"}, "output must end in .png, or name a folder, got out.jpg"),
    ],
)
def test_generate_refuses_bad_input(
    pipe: FluxPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        generate(pipe, **{"prompts": PROMPTS[:1], "output": "out.png"} | CALL | change)
    assert list(tmp_path.iterdir()) == []


def test_generate_warns_once_of_a_truncated_prompt(
    pipe: FluxPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = "a teal cross at the top left on striped mint"
    generate(pipe, [long, PROMPTS[0], long], tmp_path / "a", **CALL)
    message = "the prompt 'a teal cross at the top left on...' is truncated to 8 tokens (set by --max-sequence-length)"
    assert caplog.messages.count(f"{message}, losing 'on striped mint'") == 1
    assert caplog.text.count("is truncated to") == 1
    generate(pipe, [long + " and a blue square"], tmp_path / "b", **CALL | {"max_sequence_length": 64})
    assert caplog.text.count("is truncated to") == 1
    pipe.text_encoder_2, pipe.tokenizer_2 = pipe.text_encoder, pipe.tokenizer  # two of CLIP, as in Stable Diffusion XL
    warn_truncated_prompts(pipe, ["the red circle " * 26], None)
    assert "77 tokens (the limit of its text encoder), losing 'red circle'" in caplog.text


class OldPipeline(FluxPipeline):
    """Takes the callback of older pipelines, and no text length."""

    def __call__(
        self, prompt: Any, *, height: int, width: int, num_inference_steps: int, generator: Any, callback: Any
    ) -> Any:
        def on_step_end(_pipe: Any, step: int, time: Any, tensors: Any) -> Any:
            callback(step, time, tensors["latents"])
            return tensors

        call = {"height": height, "width": width, "num_inference_steps": num_inference_steps, "generator": generator}
        return super().__call__(prompt, **call, max_sequence_length=8, callback_on_step_end=on_step_end)


def test_generate_supports_the_callback_of_older_pipelines(
    pipe: FluxPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.__class__ = OldPipeline
    monkeypatch.setattr(pipe.vae, "decode", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(pipe, PROMPTS[:1], tmp_path / "out.png", size=(24, 32), steps=2)
    assert (tmp_path / "out.latents.safetensors").is_file()
    with pytest.raises(ValueError, match="OldPipeline takes no max_sequence_length: leave max_sequence_length out"):
        generate(pipe, PROMPTS[:1], tmp_path / "other.png", size=(24, 32), steps=2, max_sequence_length=8)


@pytest.mark.parametrize(
    ("radius", "impl", "message"),
    [
        (2, "reference", "kernel: reference"),
        (2, "tiled", "kernel: tiled"),
        (99, "auto", "kernel: original (the window covers the picture)"),
    ],
)
def test_generate_logs_the_kernel_that_runs(
    radius: float, impl: str, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = build_tiny()
    linearize_(pipe, Clear(radius=radius), impl=impl)
    with caplog.at_level(logging.INFO):
        generate(pipe, PROMPTS, tmp_path / "pictures", **CALL)
    assert [record.message for record in caplog.records].count(message) == 1


def test_place_refuses_offload_without_an_accelerator(pipe: FluxPipeline) -> None:
    with pytest.raises(ValueError, match="offload 'model' needs an accelerator"):
        place_(pipe, torch.device("cpu"), "model")
    with pytest.raises(ValueError, match="offload must be one of none, model, sequential, group, got 'all'"):
        place_(pipe, torch.device("cpu"), "all")
