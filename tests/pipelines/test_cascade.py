"""Files of a cascade: pictures of its stages, resuming after an interruption, latents decoded later."""

import shutil
from functools import wraps
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from cascade_case import FEW_STEPS, PROMPT, converted
from diffusers import FlowMatchHeunDiscreteScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_distill import build_tiny

from lineardit.pipelines.cascade import cascade_for_size
from lineardit.pipelines.decoding import decode_file
from lineardit.pipelines.generate import generate


def test_generate_makes_large_sizes_in_stages_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, out = converted(), tmp_path / "out.png"
    call: dict[str, Any] = {"size": (50, 62), "steps": 2, "max_sequence_length": 8}
    steps = 0
    forward = type(pipe.transformer).forward

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 14:
            raise RuntimeError("power cut")
        return forward(*args, **kwargs)

    monkeypatch.setattr(type(pipe.transformer), "forward", count)
    with pytest.raises(RuntimeError, match="power cut"):
        generate(pipe, [PROMPT], out, **call)
    assert sorted(path.name for path in (tmp_path / "out.stages").iterdir()) == [
        "1-16x16.png",
        "1.latents.safetensors",
        "2-32x28.png",
        "2.latents.safetensors",
    ]
    steps = 100
    generate(pipe, [PROMPT], out, **call)
    assert steps == 108  # only the last stage's 8 steps
    with Image.open(out) as image:
        assert image.size == (62, 50) and "stages" in image.info
        resumed = numpy.asarray(image).copy()
    assert not list((tmp_path / "out.stages").glob("*.safetensors"))
    generate(pipe, [PROMPT], tmp_path / "again.png", **call)
    with Image.open(tmp_path / "again.png") as image:
        assert numpy.array_equal(numpy.asarray(image), resumed)


def test_stages_of_another_picture_are_kept_unless_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, out = converted(), tmp_path / "out.png"
    call: dict[str, Any] = {"size": (32, 28), "steps": 1, "max_sequence_length": 8}
    with monkeypatch.context() as patch:
        patch.setattr("lineardit.pipelines.stages.enlarged", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(pipe, [PROMPT], out, **call)
    kept = _contents(tmp_path / "out.stages")
    assert sorted(kept) == ["1-16x16.png", "1.latents.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe.transformer), "forward", lambda *_, **__: pytest.fail("denoised"))
        for change in ({"seed": 1}, {"steps": 2}, {"about": {"model": "other"}}):
            with pytest.raises(ValueError, match=r"out.stages holds stages of another picture, or damaged ones \("):
                generate(pipe, [PROMPT], out, **call | change)
    assert _contents(tmp_path / "out.stages") == kept
    (tmp_path / "out.stages" / "3-64x64.png").write_bytes(kept["1-16x16.png"])  # left by a longer plan
    generate(pipe, [PROMPT], out, **call, seed=1, overwrite=True)
    assert sorted(_contents(tmp_path / "out.stages")) == ["1-16x16.png"]
    assert _about(tmp_path / "out.stages" / "1-16x16.png") == _about(out)
    generate(pipe, [PROMPT], out, **call, seed=1, overwrite=True)
    out.unlink()
    generate(pipe, [PROMPT], out, **call, seed=1)


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_damaged_latents_are_kept_unless_overwritten(tmp_path: Path) -> None:
    pipe, out = converted(), tmp_path / "out.png"
    call: dict[str, Any] = {"size": (32, 28), "steps": 1, "max_sequence_length": 8}
    generate(pipe, [PROMPT], tmp_path / "expected.png", **call)
    (tmp_path / "out.stages").mkdir()
    for damaged, message in (
        (tmp_path / "out.stages" / "1.latents.safetensors", r"or damaged ones \(1.latents.safetensors\): name another"),
        (tmp_path / "out.latents.safetensors", "is damaged, or no file of latents: remove it, name another output"),
    ):
        damaged.write_bytes(b"half a file")
        with pytest.raises(ValueError, match=message):
            generate(pipe, [PROMPT], out, **call)
        assert damaged.read_bytes() == b"half a file"
    generate(pipe, [PROMPT], out, **call, overwrite=True)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert numpy.array_equal(numpy.asarray(Image.open(out)), numpy.asarray(Image.open(tmp_path / "expected.png")))


def test_non_finite_latents_of_a_stage_end_the_cascade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The VAE would decode them to a black picture, which the next stage would enlarge."""
    pipe, out = converted(), tmp_path / "out.png"
    call: dict[str, Any] = {"size": (32, 28), "steps": 2, "max_sequence_length": 8}
    forward, steps = type(pipe.transformer).forward, 0

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        factor = float("nan") if steps <= 2 else 1  # NaN in the first stage
        return tuple(factor * output for output in forward(*args, **kwargs))

    with monkeypatch.context() as patch:
        patch.setattr(type(pipe.transformer), "forward", broken)
        with pytest.raises(ValueError, match="latents that are not finite"):
            generate(pipe, [PROMPT], out, **call)
    assert not list(tmp_path.rglob("*.png")) + list(tmp_path.rglob("*.safetensors"))
    generate(pipe, [PROMPT], out, **call)
    file = tmp_path / "out.stages" / "1.latents.safetensors"
    save_file({"latents": torch.full((1, 16, 16), float("nan"))}, file, metadata=_about(out))
    generate(pipe, [PROMPT], out, **call, overwrite=True)
    with Image.open(out) as image:
        assert numpy.asarray(image).any()


def _about(picture: Path) -> dict[str, str]:
    with Image.open(picture) as image:
        return {name: str(value) for name, value in image.info.items()}


def test_generate_follows_the_cascade_option(tmp_path: Path) -> None:
    pipe = converted()
    generate(pipe, [PROMPT], tmp_path / "a.png", size=(48, 48), steps=1, max_sequence_length=8, cascade=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    generate(pipe, [PROMPT], tmp_path / "b.png", size=(16, 16), steps=1, max_sequence_length=8, cascade=True)
    with Image.open(tmp_path / "b.png") as image:
        assert "stages" in image.info
    assert not (tmp_path / "b.stages").exists()  # the plan has one stage


def test_generate_at_native_size_accepts_any_scheduler(tmp_path: Path) -> None:
    pipe = converted(native_size=64)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="scheduler must be a FlowMatchEulerDiscreteScheduler"):
        generate(pipe, [PROMPT], tmp_path / "a.png", size=(128, 128), steps=1, max_sequence_length=8)
    assert cascade_for_size(pipe, 64, 64, FEW_STEPS, steps=1, text_len=8, requested=None) is None


def test_undecoded_latents_of_a_cascade_can_be_decoded_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, out = converted(), tmp_path / "out.png"
    build_tiny().save_pretrained(tmp_path / "base")
    call: dict[str, Any] = {"size": (30, 43), "steps": 1, "max_sequence_length": 8}
    generate(pipe, [PROMPT], tmp_path / "wanted.png", **call)
    high_finish = "lineardit.pipelines.high_resolution.HighResolutionPipeline._finish"
    monkeypatch.setattr(high_finish, lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("decoder")))
    with pytest.raises(torch.OutOfMemoryError):
        generate(pipe, [PROMPT], out, **call, about={"model": str(tmp_path / "base")})
    monkeypatch.undo()
    latents, copy = tmp_path / "out.latents.safetensors", tmp_path / "copy.png"
    with safe_open(latents, framework="pt") as file:
        assert file.metadata()["prompt"] == PROMPT
    shutil.copy(latents, tmp_path / "copy.latents.safetensors")
    with monkeypatch.context() as patch:
        forward = type(pipe.transformer).forward
        patch.setattr(type(pipe.transformer), "forward", wraps(forward)(lambda *_, **__: pytest.fail("denoised again")))
        generate(pipe, [PROMPT], copy, **call, about={"model": str(tmp_path / "base")})
    assert not (tmp_path / "copy.latents.safetensors").exists()
    path = decode_file(latents, device=torch.device("cpu"), dtype=torch.float32)
    assert path == out and not latents.exists()
    with Image.open(out) as image, Image.open(tmp_path / "wanted.png") as expected:
        assert numpy.array_equal(numpy.asarray(image), numpy.asarray(expected))
        assert numpy.array_equal(numpy.asarray(Image.open(copy)), numpy.asarray(expected))
        assert image.info["seed"] == "0"
