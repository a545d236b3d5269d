"""Bad input on the command line: one sentence that says what is allowed, exit code 2, nothing half-written."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from lineardit.cli import run
from lineardit.pipelines.files import write_latents

FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "_diffusers_version": "0.35.0",
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": False,
    "axes_dims_rope": [4, 6, 6],
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The configuration of a small FLUX transformer; `convert` needs no weights."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FLUX))
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Runs a command that must be refused; returns its one sentence."""
    assert run([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(("lineardit: ", "lineardit.distill: "))
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--method", "cleer", "--radius", "4"], ["cleer", "clear"]),
        (["--method", "clear", "--radius", "0"], ["radius", "> 0", "0"]),
        (["--method", "clear", "--radius=-3"], ["radius", "> 0", "-3"]),
        (["--method", "clear", "--radius", "wide"], ["radius", "wide"]),
        (["--method", "clear", "--raduis", "4"], ["--raduis", "--radius"]),
        (
            ["--method", "clear", "--radius", "4", "--pool-size", "2", "--pool-tokens", "9"],
            ["pool_size", "pool_tokens"],
        ),
        (["--radius", "4"], ["--method"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_convert_refuses_bad_options(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: list[str]
) -> None:
    sentence = refused(capsys, "convert", base, *options, "--offline", "-o", tmp_path / "out")
    assert [part for part in expected if part not in sentence] == []
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["prepare", "BASE", "--prompts", "none.txt", "-o", "OUT"], "lineardit: none.txt: No such file or directory\n"),
        (["prepare", "BASE", "--prompts", "PROMPTS", "--size", "64", "-o", "OUT"], "WIDTHxHEIGHT"),
        (["prepare", "BASE", "--prompts", "PROMPTS", "--device", "tpu", "-o", "OUT"], "cpu"),
        (["prepare", "nowhere", "--prompts", "PROMPTS", "--offline", "-o", "OUT"], "nowhere"),
        (["generate", "BASE", "-o", "OUT"], "prompt"),
        (["generate", "BASE", "a", "--size", "64x", "-o", "OUT"], "WIDTHxHEIGHT"),
        (["generate", "BASE", "a", "b", "-o", "OUT.png"], "folder"),
        (["evaluate", "BASE", "BASE", "--prompts", "none.txt", "-o", "OUT"], "none.txt"),
        (["convert", "BASE", "--method", "clear", "--radius", "4"], "--output"),
        (["convert", "BASE", "--method", "clear", "-o", "OUT"], "lacks required settings: radius\n"),
        (["convert", "EMPTY", "--method", "clear", "--radius", "4", "-o", "OUT"], "config.json"),
        (
            ["convert", "nobody/nothing", "--method", "clear", "--radius", "4", "--offline", "-o", "OUT"],
            "nobody/nothing",
        ),
        (["convrt"], "convert"),
        (["inspect", "somewhere", "--jsn", "file"], "--json"),
        (["distill", "none.toml", "--resume", "first"], "got 'first'"),  # from argparse, whose usage has several lines
        (["distill", "none.toml"], "none.toml: No such file or directory\n"),
        (["distill", "PROMPTS"], "TOML"),
        (["distill", "none.toml", "--processes", "2"], "none.toml"),
        (["distill", "none.toml", "--processes", "0"], "1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_commands_refuse_bad_input(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    places = {"BASE": base, "PROMPTS": prompts, "OUT": tmp_path / "out", "OUT.png": tmp_path / "out.png"}
    places["EMPTY"] = tmp_path / "empty"
    places["EMPTY"].mkdir()
    assert expected in refused(capsys, *(places.get(word, word) for word in arguments))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "prompts.txt", "empty"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "nowhere", "a"],
        ["upscale", "PICTURE", "nowhere", "--prompt", "a"],
        ["decode", "LATENTS"],
        ["prepare", "nowhere", "--prompts", "PROMPTS"],
        ["evaluate", "nowhere", "nowhere", "--prompts", "PROMPTS"],
        ["convert", "nowhere", "--method", "clear", "--radius", "4"],
    ],
    ids=lambda value: value[0],
)
def test_commands_check_the_output_before_loading_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    places = {name: tmp_path / name.lower() for name in ("PROMPTS", "PICTURE", "LATENTS")}
    places["PROMPTS"].write_text("a red circle\n")
    Image.new("RGB", (8, 8)).save(places["PICTURE"], format="PNG")
    write_latents(places["LATENTS"], torch.zeros(1, 4, 16), {"model": "nowhere", "size": "8x8"})
    command = [places.get(word, word) for word in arguments]
    output = places["PROMPTS"] / "deep" / ("out.png" if arguments[0] in ("upscale", "decode") else "out")
    sentence = refused(capsys, *command, "--offline", "-o", output)
    assert f"cannot write in {places['PROMPTS']} (Not a directory): choose another output" in sentence


def test_traceback_option_shows_the_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config"):
        run(["--traceback", "inspect", str(tmp_path)])


def test_table_prints_brackets_and_colons_of_a_name_unchanged(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    renamed = base.rename(base.parent / "a[red]b:key:")
    assert run(["inspect", str(renamed)]) == 0
    assert str(renamed) in capsys.readouterr().out
