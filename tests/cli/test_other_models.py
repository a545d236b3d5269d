"""Models other than FLUX.1 on the command line, from prompts to pictures of a distilled student."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_distill import CONFIG, PROMPTS
from whole_pipelines import WHOLE

from lineardit.cli import run
from lineardit.linearize.networks import denoiser

FINISH = "lineardit.pipelines.high_resolution.HighResolutionPipeline._finish"


# Of the two UNets one runs in each test, the other in `make test-all`.
DISTILLED, LARGE = (
    [pytest.param(name, marks=pytest.mark.slow if name == other else ()) for name in WHOLE] for other in ("sdxl", "sd")
)


@pytest.mark.parametrize("name", DISTILLED)
def test_model_is_distilled_evaluated_and_used(name: str, tmp_path: Path) -> None:
    make, size = WHOLE[name]
    base, samples, config = tmp_path / "base", tmp_path / "samples", tmp_path / "config.toml"
    make().save_pretrained(base)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:3]))
    drawing = ["--prompts", str(tmp_path / "prompts.txt"), "--size", size, "--steps", "3"]
    drawing += ["--argument", f"negative_prompt={PROMPTS[5]}"]
    assert run(["prepare", str(base), *drawing, "--calls", "2", "-o", str(samples)]) == 0
    config.write_text(CONFIG.format(base=base, samples=samples, run=tmp_path / "run"))
    changed = ["--set", "loss.flow=0.0", "--set", "validate.samples=1"]
    assert run(["distill", str(config), *changed]) == 0
    adapter = str(tmp_path / "run" / "adapter")
    evaluation = ["evaluate", str(base), adapter, *drawing, "--batch-size", "2", "--no-memory"]
    assert run([*evaluation, "-o", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["latent_mse"] > 0 and report["settings"]["steps"] == 3
    assert run(["generate", adapter, *drawing, "--batch-size", "2", "-o", str(tmp_path / "pictures")]) == 0
    width, height = map(int, size.split("x"))
    drawn = [Image.open(file) for file in sorted((tmp_path / "pictures").glob("*.png"))]
    assert [image.size for image in drawn] == [(width, height)] * 3
    assert {image.info["negative_prompt"] for image in drawn} == {PROMPTS[5]}
    pictures = sorted((tmp_path / "report" / "pictures").rglob("*.png"))
    assert any(Image.open(file).tobytes() == drawn[0].tobytes() for file in pictures)  # `evaluate` draws the same


@pytest.mark.parametrize("name", LARGE)
def test_large_pictures_are_made_in_stages_and_resumed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, size = WHOLE[name]
    pipe = make()
    width, height = (2 * int(side) for side in size.split("x"))
    denoiser(pipe)[1].register_to_config(sample_size=min(width, height) // 2 // pipe.vae_scale_factor)
    pipe.save_pretrained(tmp_path / "base")
    adapter, out, offline = str(tmp_path / "adapter"), tmp_path / "out.png", ["--offline"]
    conversion = ["--method", "clear", "--radius", "2", "-o", adapter, *offline]
    assert run(["convert", str(tmp_path / "base"), *conversion]) == 0
    drawing = [PROMPTS[0], "--size", f"{width}x{height}", "--steps", "2", "--argument", f"negative_prompt={PROMPTS[5]}"]
    drawing += offline
    with monkeypatch.context() as patch:
        patch.setattr(FINISH, lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("decoder")))
        assert run(["generate", adapter, *drawing, "-o", str(out)]) == 1
    stages = sorted(path.name for path in (tmp_path / "out.stages").glob("*.png"))
    assert len(stages) == 2 and not out.exists()  # the third one is not decoded yet
    latents = tmp_path / "out.latents.safetensors"
    shutil.copy(latents, tmp_path / "copy.latents.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(type(denoiser(pipe)[1]), "forward", lambda *_, **__: pytest.fail("denoised again"))
        assert run(["generate", adapter, *drawing, "-o", str(out)]) == 0
    assert run(["decode", str(tmp_path / "copy.latents.safetensors"), *offline]) == 0
    with Image.open(out) as picture, Image.open(tmp_path / "copy.png") as decoded:
        assert picture.size == (width, height) and picture.tobytes() == decoded.tobytes()
    small, large = tmp_path / "out.stages" / stages[0], tmp_path / "large.png"
    options = ["--prompt", PROMPTS[0], "--size", f"{width}x{height}", "--steps", "2", *offline]
    assert run(["upscale", str(small), adapter, *options, "-o", str(large)]) == 0
    with Image.open(large) as picture:
        assert picture.size == (width, height)
