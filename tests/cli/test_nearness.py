"""`lineardit nearness` on the command line."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny_distill import build_tiny
from two_conversions import convert_twice

from lineardit.cli import run
from lineardit.linearize.measures.nearness import Nearness
from lineardit.plots import draw_nearness


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two conversions of it, prompts, and the command's output."""
    folder = tmp_path_factory.mktemp("nearness")
    build_tiny().save_pretrained(folder / "base")
    (folder / "prompts.txt").write_text("a red circle\na blue cross\n")
    convert_twice(folder)
    assert run(command(folder)) == 0
    return folder


def command(folder: Path, *options: str) -> list[str]:
    args = ["nearness", folder / "base", folder / "clear-1.5", folder / "clear-3", "--prompts", folder / "prompts.txt"]
    args += ["--size", "32x24", "--steps", "3", "--max-sequence-length", "8", "--offline", "-o", folder / "out"]
    return [*map(str, args), *options]


def test_nearness_writes_figures_and_a_picture(folder: Path) -> None:
    content = json.loads((folder / "out" / "nearness.json").read_text())
    assert (content["prompts"], content["steps"], content["size"]) == (2, 3, [24, 32])
    means = [content["models"][str(folder / name)]["mean"] for name in ("base", "clear-3", "clear-1.5")]
    assert means == sorted(means)
    assert means[0] == 0 < means[1] < means[2]
    assert all(len(model["errors"]) == 3 for model in content["models"].values())
    with Image.open(folder / "out" / "nearness.png") as picture:
        assert min(picture.size) > 200


def test_draw_nearness_accepts_names_with_markup_characters(tmp_path: Path) -> None:
    drawn = Nearness(errors=(0.1, 0.2), seconds=1.0)
    draw_nearness({"$x^$": drawn, "_hidden" + 200 * "long": drawn}, tmp_path / "nearness.png")
    with Image.open(tmp_path / "nearness.png") as picture:
        assert min(picture.size) > 200


def test_nearness_keeps_existing_output_unless_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command(folder)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(command(folder, "--overwrite")) == 0
    assert "seconds" in capsys.readouterr().out


def test_nearness_refuses_a_converted_base(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["nearness", folder / "clear-3", folder / "clear-1.5", "--prompts", folder / "prompts.txt"]
    assert run([*map(str, args), "--size", "32x24", "--offline", "-o", str(folder / "other")]) == 2
    assert "pipe must be the original pipeline" in capsys.readouterr().err
    assert not (folder / "other").exists()


def test_nearness_refuses_a_missing_adapter_before_measuring(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["nearness", folder / "base", folder / "clear-3", folder / "nothing", "--prompts", folder / "prompts.txt"]
    assert run([*map(str, args), "--size", "32x24", "--offline", "-o", str(folder / "other")]) == 2
    message = capsys.readouterr().err
    assert "nothing is neither a local folder nor a Hub id" in message and "picture" not in message
    (folder / "empty").mkdir(exist_ok=True)
    args[3] = folder / "empty"
    assert run([*map(str, args), "--size", "32x24", "--offline", "-o", str(folder / "other")]) == 2
    assert "picture" not in capsys.readouterr().err
