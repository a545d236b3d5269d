"""The example scripts run unchanged, here on a small model with random weights."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from tiny_distill import build_tiny

from lineardit import Clear, linearize_, save_adapter

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    base = build_tiny()
    base.vae.register_to_config(sample_size=16)
    base.save_pretrained(folder / "base")
    pipe = FluxPipeline.from_pretrained(folder / "base")
    linearize_(pipe, Clear(radius=2))
    save_adapter(pipe, folder / "adapter")
    return folder / "adapter"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("style")
    pipe = build_tiny()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    return folder


def test_bf16_positions_counts_the_distinct_positions(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "bf16_positions.py"), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["4096", "256", "256", "256", "256"] in rows and ["8192", "512", "512", "385", "385"] in rows


@pytest.mark.parametrize(
    ("script", "picture"),
    [("text_to_image_4k", "4k"), ("low_memory", "low_memory"), ("style_lora_4k", "style"), ("upscale", "upscaled")],
)
def test_script_makes_its_picture(
    script: str, picture: str, adapter: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.linear_gradient("L").resize((10, 8)).save(tmp_path / "photo.png")
    arguments = {"style_lora_4k": [str(lora), "a style", "32x24"], "upscale": ["photo.png", "what it shows"]}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, str(adapter), *arguments.get(script, ["a prompt", "32x24"])])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    with Image.open(tmp_path / f"{picture}.png") as image:
        assert image.size == ((40, 32) if script == "upscale" else (32, 24))


@pytest.mark.parametrize("script", ["text_to_image_4k", "low_memory", "style_lora_4k", "upscale"])
def test_script_without_arguments_prints_its_usage(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, "adapter"])
    with pytest.raises(SystemExit, match=rf"^usage: python examples/{script}\.py ADAPTER .*PROMPT"):
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
