"""`lineardit generate` in stages, `upscale` and `decode` on the command line."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny_distill import build_tiny
from typed import lineardit

from lineardit import Clear, HighResolutionPipeline, from_pretrained, linearize_, save_adapter

PROMPT = "a red circle"
FEW = ("--steps", "1", "--max-sequence-length", "8", "--offline")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    pipe = build_tiny()
    pipe.vae.register_to_config(sample_size=16)
    pipe.save_pretrained(folder / "base")
    pipe = FluxPipeline.from_pretrained(folder / "base")
    linearize_(pipe, Clear(radius=2))
    save_adapter(pipe, folder / "adapter")
    return folder / "adapter"


def test_generate_keeps_the_pictures_of_its_stages(adapter: Path, tmp_path: Path) -> None:
    assert lineardit("generate", adapter, PROMPT, "--size", "45x33", *FEW, "-o", tmp_path / "out.png") == 0
    assert sorted(path.name for path in (tmp_path / "out.stages").iterdir()) == ["1-20x12.png", "2-28x24.png"]
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (45, 33)
    direct = ("generate", adapter, PROMPT, "--size", "44x32", *FEW, "--direct")
    assert lineardit(*direct, "-o", tmp_path / "b.png") == 0
    assert not (tmp_path / "b.stages").exists()
    assert lineardit(*direct, "--chunk-tokens", "9", "-o", tmp_path / "c.png") == 0
    unchunked, chunked = (numpy.asarray(Image.open(tmp_path / name), int) for name in ("b.png", "c.png"))
    assert abs(unchunked - chunked).max() <= 1


def test_generate_accepts_stage_settings_and_prints_the_plan(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--strength", "0.5", "--stage-steps", "3", "--sharpen", "0", "--tile", "64")
    generate, out = ("generate", adapter, *FEW), tmp_path / "out.png"
    assert lineardit(*generate, "--size", "32x32", *options, "--plan", "-o", out) == 0
    output = capsys.readouterr().out
    assert "32x32 in 2 stages" in output and "32x32, 3 steps, converted attention, from noise level 0.5" in output
    assert not list(tmp_path.iterdir())
    assert lineardit(*generate, PROMPT, "--size", "32x32", *options, "-o", out) == 0
    with Image.open(out) as image:
        plan = json.loads(image.info["stages"])
    second = plan["stages"][1]
    assert (second["strength"], second["steps"], second["sharpen"], plan["tile"]) == (0.5, 3, 0.0, 64)
    capsys.readouterr()
    for size, option, remedy in (
        ("16x16", options[:2], "leave them out, or make a larger picture"),
        ("16x16", (*options[:2], "--cascade"), "leave them out, or make a larger picture"),
        ("32x32", (*options[:2], "--direct"), "leave them out, or leave out cascade=False (--direct)"),
        ("16x16", options[6:], "leave it out, or add cascade=True (--cascade)"),
    ):
        assert lineardit(*generate, PROMPT, "--size", size, *option, "-o", tmp_path / "b.png") == 2
        assert f"{size} is made in one stage: {remedy}" in capsys.readouterr().err.splitlines()[-1]
    assert lineardit(*generate, "--size", "16x16", "--plan") == 0
    assert "one call of the pipeline, no stages" in capsys.readouterr().out


def test_plan_reads_no_weights(adapter: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(adapter.parent / "base", tmp_path / "base")
    command = ("generate", adapter, "--base", tmp_path / "base", "--size", "45x33", "--plan", "--dtype", "bfloat16")
    pipe = from_pretrained(adapter, base=tmp_path / "base", dtype=torch.bfloat16)
    plan = HighResolutionPipeline.from_pipe(pipe).plan(33, 45)
    for file in (tmp_path / "base").rglob("*.safetensors"):
        file.unlink()
    capsys.readouterr()
    assert lineardit(*command) == 0
    printed, expected = (re.sub(r"about \d+ s", "", text) for text in (capsys.readouterr().out, f"{plan}\n"))
    assert printed == expected and "GiB" in printed
    assert lineardit(*command, "--offload", "model", "--device", "cpu") == 2
    assert "offload 'model' needs an accelerator" in capsys.readouterr().err


def test_generate_logs_stages_and_kernels(adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = ("--size", "45x33", "--chunk-tokens", "9", *FEW, "-o", tmp_path / "out.png")
    assert lineardit("generate", adapter, PROMPT, *options) == 0
    assert "token-wise layers in chunks of 9" in caplog.text
    assert "stage 2 of 3, 28x24, converted attention, kernel: masked" in caplog.text
    assert lineardit("generate", adapter, PROMPT, *options) == 0
    assert "the picture already exists" in caplog.messages


def test_upscale_takes_prompt_and_model_from_the_picture(
    adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    assert lineardit("generate", adapter, PROMPT, "--size", "16x16", *FEW, "-o", small) == 0
    options = ("--size", "36x32", "--chunk-tokens", "16", "--guidance", "2", *FEW, "-o", large)
    assert lineardit("upscale", small, *options) == 0
    assert "the picture is stretched: the aspect ratio of 36x32 differs from its own, 16x16" in caplog.text
    with Image.open(large) as image:
        assert image.size == (36, 32) and image.info["prompt"] == PROMPT and image.info["adapter"] == str(adapter)
        assert (image.info["guidance"], image.info["max_sequence_length"]) == ("2.0", "8")  # a rerun compares them


def test_upscale_uses_the_settings_recorded_in_the_picture(adapter: Path, tmp_path: Path, capsys: Any) -> None:
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    drawing = ("--guidance", "2", "--argument", "negative_prompt=blurred, ünsharp", "--argument", "true_cfg_scale=3")
    assert lineardit("generate", adapter, PROMPT, "--size", "16x16", *FEW, *drawing, "-o", small) == 0
    command = ("upscale", small, "--size", "32x32", "--steps", "1", "--offline", "-o", large)
    assert lineardit(*command) == 0
    settings = "guidance=2.0, max_sequence_length=8, negative_prompt='blurred, ünsharp', true_cfg_scale=3.0"
    assert f"as recorded in the picture: {settings}\n" in capsys.readouterr().out
    with Image.open(large) as image:
        recorded = image.info
    names = ("guidance", "max_sequence_length", "negative_prompt", "true_cfg_scale")
    assert [recorded[name] for name in names] == ["2.0", "8", "blurred, ünsharp", "3.0"]
    overrides = ("--guidance", "1", "--max-sequence-length", "9", "--argument", "negative_prompt=", "--overwrite")
    assert lineardit(*command, *overrides) == 0
    with Image.open(large) as image:
        assert [image.info[name] for name in names] == ["1.0", "9", "", "3.0"]
    with Image.open(small) as image:
        info = PngInfo()
        for name, text in (image.info | {"guidance": "much"}).items():
            info.add_text(name, text)
        image.save(small, pnginfo=info)
    assert lineardit(*command, "--overwrite") == 2
    assert "small.png does not record correctly how it was made" in capsys.readouterr().err


def test_no_weights_are_read_for_existing_pictures(
    adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, small, large = tmp_path / "base", tmp_path / "small.png", tmp_path / "large.png"
    shutil.copytree(adapter.parent / "base", base)
    options = ("--base", base, *FEW)
    generate = ("generate", adapter, PROMPT, "--size", "45x33", *options, "-o")
    upscale = ("upscale", small, adapter, "--size", "90x66", *options, "-o", large)
    part = ("--count", "2", "--part", "2/2")
    assert [lineardit(*call) for call in ((*generate, small), (*generate, tmp_path, *part), upscale)] == [0, 0, 0]
    for file in base.rglob("*.safetensors"):
        file.unlink()
    caplog.clear()
    assert lineardit(*generate, small) == lineardit(*generate, tmp_path, *part) == lineardit(*upscale) == 0
    assert caplog.messages.count("the picture already exists") == 3
    assert lineardit(*generate, small, "--overwrite") == lineardit(*generate, tmp_path / "b.png") == 2


def test_upscale_with_another_model_uses_only_the_prompt(adapter: Path, tmp_path: Path, capsys: Any) -> None:
    small, other = tmp_path / "small.png", tmp_path / "other"
    assert lineardit("generate", adapter, PROMPT, "--size", "16x16", *FEW, "--guidance", "2", "-o", small) == 0
    shutil.copytree(adapter.parent / "base", other)
    assert lineardit("upscale", small, other, "--size", "32x32", *FEW, "-o", tmp_path / "large.png") == 0
    assert "as recorded in the picture" not in capsys.readouterr().out
    with Image.open(tmp_path / "large.png") as image:
        assert image.info["prompt"] == PROMPT and "guidance" not in image.info


def test_upscale_keeps_stages_of_another_picture(adapter: Path, tmp_path: Path, capsys: Any) -> None:
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    Image.new("RGB", (16, 16)).save(small)
    command = ("upscale", small, adapter, "--prompt", PROMPT, "--size", "56x56", *FEW, "-o", large)
    assert lineardit(*command) == 0
    assert [path.name for path in (tmp_path / "large.stages").iterdir()] == ["1-28x28.png"]
    modified = large.stat().st_mtime_ns
    assert lineardit(*command) == 0 and large.stat().st_mtime_ns == modified  # already made
    assert lineardit(*command, "--strength", "0.5") == 2
    assert "large.png exists, was made with other settings" in capsys.readouterr().err
    large.unlink()
    assert lineardit(*command, "--strength", "0.5") == 2
    assert "large.stages holds stages of another picture" in capsys.readouterr().err
    assert lineardit(*command, "--strength", "0.5", "--overwrite") == 0


def test_upscale_uses_the_base_that_made_the_picture(adapter: Path, tmp_path: Path, capsys: Any) -> None:
    small, other = tmp_path / "small.png", tmp_path / "other"
    shutil.copytree(adapter.parent / "base", other)
    at = ("--size", "16x16", *FEW, "-o", small)
    assert lineardit("generate", adapter, PROMPT, *at, "--base", other) == 0
    assert lineardit("upscale", small, "--size", "32x32", *FEW, "-o", tmp_path / "large.png") == 0
    assert f"using the base {other}, as recorded in the picture" in capsys.readouterr().out
    with Image.open(tmp_path / "large.png") as image:
        assert image.info["model"] == str(other)
    assert lineardit("generate", adapter, PROMPT, *at, "--overwrite") == 0
    assert lineardit("upscale", small, "--size", "32x32", *FEW, "-o", tmp_path / "b.png") == 0
    assert "as recorded in the picture" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["PLAIN", "MODEL"], "does not record how it was made: give --prompt"),
        (["PLAIN", "--prompt", "a"], "does not record how it was made: give the model, after the picture"),
        (["PLAIN", "MODEL", "--prompt", "a", "--size", "16x99"], "must be larger than the picture on both sides"),
        (["PLAIN", "MODEL", "--prompt", "a", "--strength", "2"], "strength of a stage must be in (0, 1], got 2.0"),
        (["PLAIN", "MODEL", "--prompt", "a", "--seed", "-1"], "'--seed': Input should be greater than or equal to 0"),
        (["PLAIN", "MODEL", "--prompt", "a", "--steps", "0"], "steps of a stage must be an integer >= 1, got 0"),
        (["PLAIN", "MODEL", "--prompt", "a", "-o", "x.jpg"], "output must end in .png, got x.jpg"),
        (["NONE", "MODEL", "--prompt", "a"], "no such picture"),
        (["TEXT", "MODEL", "--prompt", "a"], "is not a picture"),
        (
            ["HALF", "MODEL", "--prompt", "a"],
            "d.png is not a picture that Pillow can read completely: image file is truncated",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_upscale_refuses_bad_input_in_one_sentence(
    adapter: Path, tmp_path: Path, capsys: Any, args: list[str], expected: str
) -> None:
    places = {"PLAIN": tmp_path / "a.png", "TEXT": tmp_path / "b.png", "NONE": tmp_path / "c.png", "MODEL": adapter}
    Image.new("RGB", (20, 20)).save(places["PLAIN"])
    places["TEXT"].write_text("no")
    places["HALF"] = tmp_path / "d.png"
    Image.effect_noise((99, 99), 50).save(places["HALF"])
    places["HALF"].write_bytes(places["HALF"].read_bytes()[:5000])
    output = [] if "-o" in args else ["-o", tmp_path / "out.png"]
    capsys.readouterr()
    assert lineardit("upscale", *(places.get(word, word) for word in args), *output, "--offline") == 2
    message = capsys.readouterr().err
    assert expected in message and message.splitlines()[-1].startswith("lineardit: ")
    assert not (tmp_path / "out.png").exists() and not (tmp_path / "out.stages").exists()


def test_decode_finishes_a_generate_that_ran_out_of_memory(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    finish = "lineardit.pipelines.high_resolution.HighResolutionPipeline._finish"
    out = tmp_path / "out.png"
    with monkeypatch.context() as patch:
        patch.setattr(finish, lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("decoder")))
        assert lineardit("generate", adapter, PROMPT, "--size", "42x32", *FEW, "-o", out) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("lineardit: out of memory: decoder; use a smaller size")
    latents = tmp_path / "out.latents.safetensors"
    assert latents.is_file() and not out.exists()
    assert lineardit("decode", latents, "--offline", "--tile", "9") == 2
    assert lineardit("decode", latents, "--offline") == 0
    assert not list((tmp_path / "out.stages").glob("*.safetensors"))
    with Image.open(out) as image:
        assert image.size == (42, 32) and image.info["prompt"] == PROMPT
    assert not latents.exists()
    latents.write_text("no")
    (tmp_path / "folder.png").mkdir()
    for command in (("decode", latents), ("generate", adapter, PROMPT, *FEW), ("upscale", out, *FEW)):
        assert lineardit(*command, "--overwrite", "-o", tmp_path / "folder.png") == 2
    assert lineardit("decode", latents, "-o", tmp_path / "b.png") == 2
