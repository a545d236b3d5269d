"""`--lora` of `lineardit generate` and `lineardit upscale`: styles on a converted model."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_distill import build_tiny
from typed import lineardit

from lineardit import Clear, linearize_, save_adapter

SMALL = ("--size", "32x24", "--steps", "1", "--max-sequence-length", "8", "--offline")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an adapter, a style for it and one for another model."""
    folder = tmp_path_factory.mktemp("loras")
    build_tiny().save_pretrained(folder / "base")
    pipe = type(build_tiny()).from_pretrained(folder / "base")
    linearize_(pipe, Clear(radius=2))
    save_adapter(pipe, folder / "adapter")
    torch.manual_seed(0)
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    down, up = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
    for name, part in (("style", "transformer"), ("other", "unet")):
        module = f"{part}.transformer_blocks.0.attn.to_q"
        tensors = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def generate(folder: Path, out: Path, *more: str) -> Image.Image:
    assert lineardit("generate", folder / "adapter", "a", *SMALL, *more, "-o", out) == 0
    with Image.open(out) as image:
        image.load()
    return image


def test_style_is_applied_at_its_weight_and_recorded(folder: Path, tmp_path: Path) -> None:
    style = str(folder / "style.safetensors")
    plain = generate(folder, tmp_path / "plain.png")
    styled = generate(folder, tmp_path / "styled.png", "--lora", style)
    assert styled.tobytes() != plain.tobytes()
    assert styled.info["lora"] == f"{style}:1"
    assert "lora" not in plain.info
    assert generate(folder, tmp_path / "none.png", "--lora", f"{style}:0").tobytes() == plain.tobytes()
    twice = generate(folder, tmp_path / "twice.png", "--lora", f"{style}:0.5", "--lora", f"{style}:0.5")
    assert twice.info["lora"] == f"{style}:0.5, {style}:0.5"
    assert twice.tobytes() == styled.tobytes()


def test_plan_accepts_a_style(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("generate", folder / "adapter", *SMALL, "--cascade", "--plan", "--lora")
    assert lineardit(*command, folder / "style.safetensors") == 0
    assert "32x24 in 1 stage\n" in capsys.readouterr().out
    assert lineardit(*command, folder / "other.safetensors") == 2
    assert "is for another model than this FluxPipeline" in capsys.readouterr().err


def test_upscale_accepts_a_style_and_reminds_of_a_recorded_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    style, styled = str(folder / "style.safetensors"), tmp_path / "styled.png"
    generate(folder, styled, "--lora", style)
    upscale = ("upscale", styled, "--steps", "1", "--max-sequence-length", "8", "--offline", "-o")
    assert lineardit(*upscale, tmp_path / "plain.png") == 0
    assert f"was made with --lora {style}:1: give it again to keep its style" in capsys.readouterr().out
    assert lineardit(*upscale, tmp_path / "large.png", "--lora", style) == 0
    assert "give it again" not in capsys.readouterr().out
    with Image.open(tmp_path / "plain.png") as plain, Image.open(tmp_path / "large.png") as large:
        assert plain.size == large.size == (64, 48)
        assert plain.tobytes() != large.tobytes()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("nothing.safetensors", "--lora: nothing.safetensors does not exist"),
        ("nothing.safetensors:0.5", "--lora: nothing.safetensors does not exist"),
        ("{folder}/style.safetensors:nan", "the weight a number such as 0.8"),
        ("{folder}/style.safetensors:", "the weight a number such as 0.8"),
        ("{folder}/adapter/lineardit.json", "a file that ends in .safetensors"),
        ("{folder}/other.safetensors", "is for another model than this FluxPipeline"),
    ],
)
def test_invalid_style_is_refused(
    folder: Path, tmp_path: Path, lora: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    assert lineardit("generate", folder / "adapter", "a", *SMALL, "--lora", lora.format(folder=folder), "-o", out) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
