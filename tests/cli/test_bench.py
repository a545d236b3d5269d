"""`lineardit bench` on the command line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from two_conversions import convert_twice

from lineardit import Clear
from lineardit.cli import run
from lineardit.commands.bench import verdict
from lineardit.linearize.adapters.conversion import convert_base
from lineardit.linearize.measures.flops import StepFlops
from lineardit.linearize.measures.step_times import StepTime
from lineardit.linearize.measures.weightless_conversion import Conditions, WeightlessConversion
from lineardit.linearize.seam.original import COVERED, dense_below_text
from lineardit.plots import draw_step_times
from tiny_models import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs of a base, two conversions of it, and the command's output."""
    folder = tmp_path_factory.mktemp("bench")
    build("flux").save_config(folder / "base")
    convert_twice(folder)
    assert run(command(folder)) == 0
    return folder


def command(folder: Path, *options: str) -> list[str]:
    args = ["bench", folder / "clear-1.5", folder / "clear-3", "--size", "64x64", "--size", "128x64", "--pairs", "2"]
    args += ["--max-sequence-length", "7", "--offline", "-o", folder / "out"]
    return [*map(str, args), *options]


def test_bench_writes_figures_and_a_picture(folder: Path) -> None:
    content = json.loads((folder / "out" / "bench.json").read_text())
    assert (content["dtype"], content["pairs"], content["text_len"]) == ("float32", 2, 7)
    assert list(content["conversions"]) == [str(folder / "clear-1.5"), str(folder / "clear-3")]
    for rows in content["conversions"].values():
        assert [(row["height"], row["width"], row["tokens"]) for row in rows] == [(64, 64, 16), (64, 128, 32)]
        for row in rows:
            assert len(row["original"]) == len(row["converted"]) == 2
            assert row["speedup"] > 0
    with Image.open(folder / "out" / "bench.png") as picture:
        assert min(picture.size) > 200


def test_bench_keeps_existing_output_unless_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command(folder)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(command(folder, "--overwrite")) == 0
    output = capsys.readouterr().out
    assert output.count("128x64") >= 2 and "ratio" in output and "GiB" not in output


def test_bench_refuses_bad_input_before_measuring(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error_of(*words: str) -> str:
        assert run(["bench", str(folder / "clear-3"), *words, "--offline", "-o", str(folder / "other")]) == 2
        assert not (folder / "other").exists()
        return capsys.readouterr().err

    assert "is an unconverted base" in error_of(str(folder / "base"))
    assert "multiples of 16 pixels" in error_of("--size", "64x64", "--size", "65x64")
    assert "WIDTHxHEIGHT" in error_of("--size", "64")
    assert "got 'tield' (did you mean tiled?)" in error_of("--impl", "tield")
    assert "is neither a local folder nor a Hub id" in error_of(str(folder / "nothing"))
    assert run(["bench", str(folder / "clear-3"), "--offline", "-o", str(folder / "base" / "config.json")]) == 2
    assert "the output must be a folder, but " in capsys.readouterr().err
    assert run(["bench", "nosuch", "--offline", "-o", str(folder / "base" / "config.json")]) == 2
    assert "nosuch is neither a local folder nor a Hub id" in capsys.readouterr().err


def test_bench_accepts_names_with_markup_characters(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    renamed = folder / "_[red]$x^$"
    (folder / "clear-3").rename(renamed)
    try:
        args = ["bench", renamed, "--size", "64x64", "--pairs", "1", "--offline", "-o", folder / "odd"]
        assert run([*map(str, args)]) == 0
        assert "_[red]$x^$" in capsys.readouterr().out.replace("\n", "")
    finally:
        renamed.rename(folder / "clear-3")


def test_draw_step_times_leaves_out_sizes_that_do_not_fit(tmp_path: Path) -> None:
    unmeasured = replace(row(256, 1), original=None, converted=None)
    for rows in ([unmeasured], [row(64, 2.0), unmeasured]):
        draw_step_times({"a": rows}, tmp_path / "bench.png")
        with Image.open(tmp_path / "bench.png") as picture:
            assert min(picture.size) > 200


def row(side: int, speedup: float | None) -> StepTime:
    flops = StepFlops(size="", grid=(1, 1), attention_before=1, attention_after=1, before=2)
    return StepTime(
        height=side, width=side, tokens=side * side, flops=flops, runs="tiled", original_gib=None, converted_gib=None,
        original=None if speedup is None else (speedup,), converted=(1.0,),
    )  # fmt: skip


def test_verdict_names_the_size_from_which_the_conversion_is_faster() -> None:
    assert verdict([row(64, 0.5), row(128, 1.5), row(256, None)]) == "The conversion is faster from 128x128 on."
    assert verdict([row(64, 1.5), row(128, 0.9), row(256, 2.0)]) == "The conversion is faster from 256x256 on."
    assert "64x64 (the smallest size measured) on" in verdict([row(64, 1.5), row(128, 2)])
    unmeasured = replace(row(256, 1), original=None, converted=None)
    assert verdict([row(64, 2.0), row(128, 3.0), unmeasured]).startswith("The conversion is faster from 64x64")
    assert verdict([unmeasured]).startswith("No step of the conversion fits")
    assert "At 128x128 the conversion is not faster" in verdict([row(64, 1.5), row(128, 0.9)])


def test_verdict_leaves_out_sizes_at_which_the_original_runs() -> None:
    same = [replace(row(side, 1.1), runs=dense_below_text(4096)) for side in (32, 64)]
    assert verdict([*same, row(128, 1.5)]).startswith("The conversion is faster from 128x128 (the smallest")
    assert verdict([*same, row(128, 0.9)]).startswith("At 128x128 the conversion is not faster")
    assert verdict(same).startswith("At these sizes the conversion runs the original attention")
    assert not replace(same[0], runs=f"{dense_below_text(4096)}, tiled").is_original
    assert replace(same[0], runs=f"{dense_below_text(4096)}, {COVERED}").is_original


def test_count_size_uses_the_original_attention_below_dense_below(folder: Path, tmp_path: Path) -> None:
    convert_base(folder / "base", Clear(radius=1.5), output=tmp_path / "adapter", dense_below=100)
    conversion = WeightlessConversion.read(tmp_path / "adapter", offline=True)
    auto = Conditions(device=torch.device("cpu"), dtype=torch.float32)
    for conditions in (auto, replace(auto, compiled=True)):
        _, small, runs = conversion.count_size((64, 64), conditions)
        assert small.after == small.before and runs == "original (fewer than 100 image tokens)"
        _, large, runs = conversion.count_size((256, 256), conditions)
        assert large.after < large.before and "original" not in runs
    _, forced, runs = conversion.count_size((64, 64), replace(auto, impl="tiled"))
    assert forced.after < small.after and runs == "tiled"
