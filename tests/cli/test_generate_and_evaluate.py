"""`lineardit generate` and `lineardit evaluate` on the command line."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typed import lineardit

from lineardit import __version__

SCENE = "a red circle at the top left on striped sand"
SMALL = ("--size", "32x24", "--steps", "1", "--max-sequence-length", "8", "--offline")


def test_generate_with_an_adapter_records_its_settings(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    assert lineardit("generate", adapter, SCENE, *SMALL, "--seed", "4", "-o", out) == 0
    assert str(out) in capsys.readouterr().out
    with Image.open(out) as image:
        assert image.size == (32, 24)
        info = image.info
    expected = {"prompt": SCENE, "seed": "4", "steps": "1", "size": "32x24", "lineardit": __version__}
    assert info.items() >= expected.items()
    assert info["adapter"] == str(adapter)
    assert info["model"] == str(base)


def test_argument_options_reach_the_pipeline(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--argument", "negative_prompt=a blue square", "--argument", "true_cfg_scale=3.0")
    assert lineardit("generate", base, SCENE, *SMALL, "-o", tmp_path / "plain.png") == 0
    assert lineardit("generate", base, SCENE, *SMALL, *more, "-o", tmp_path / "guided.png") == 0
    with Image.open(tmp_path / "plain.png") as plain, Image.open(tmp_path / "guided.png") as guided:
        assert plain.tobytes() != guided.tobytes()
        assert guided.info.items() >= {"negative_prompt": "a blue square", "true_cfg_scale": "3.0"}.items()
    prompts, report = tmp_path / "prompts.txt", tmp_path / "report"
    prompts.write_text(SCENE)
    evaluate = ("evaluate", base, adapter, "--prompts", prompts, *SMALL, "--no-memory", "-o")
    assert lineardit(*evaluate, report, *more) == 0
    assert "1 picture of 32x24, 1 step\n" in capsys.readouterr().out
    with Image.open(next((report / "pictures").rglob("*.png"))) as drawn, Image.open(tmp_path / "guided.png") as guided:
        assert drawn.tobytes() == guided.tobytes()
    assert lineardit(*evaluate, tmp_path / "no", "--argument", "negativ_prompt=x") == 2
    assert "FluxPipeline takes no negativ_prompt; did you mean negative_prompt?" in capsys.readouterr().err


def test_stochastic_steps_are_reproducible(base: Path, adapter: Path, tmp_path: Path) -> None:
    pixels = {}
    for name, more in {"plain": (), "one": ("--stochastic",), "two": ("--stochastic",)}.items():
        out = tmp_path / f"{name}.png"
        assert lineardit("generate", adapter, SCENE, *SMALL, "--steps", "2", *more, "-o", out) == 0
        with Image.open(out) as image:
            assert image.info.get("stochastic") == ("True" if more else None)
            pixels[name] = image.tobytes()
    assert pixels["one"] == pixels["two"] != pixels["plain"]
    kept = ("generate", adapter, SCENE, *SMALL, "--steps", "2", "--stochastic", "-o", tmp_path / "plain.png")
    assert lineardit(*kept) == 2


def test_generate_draws_a_file_of_prompts_with_a_base(base: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n# two\nthree\n")
    assert lineardit("generate", base, "--prompts", prompts, *SMALL, "--batch-size", "2", "-o", tmp_path / "many") == 0
    names = sorted(path.name for path in (tmp_path / "many").iterdir())
    assert names == ["000.png", "001.png"]
    with Image.open(tmp_path / "many" / "001.png") as image:
        assert image.info["prompt"] == "three"
        assert "adapter" not in image.info


def test_count_adds_pictures_and_keeps_the_first(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pictures"
    generate = ("generate", base, "one", "two", *SMALL, "--seed", "5", "-o")
    assert lineardit(*generate, out) == 0
    first = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert lineardit(*generate, out, "--count", "2") == 0
    infos = []
    for path in sorted(out.iterdir()):
        with Image.open(path) as image:
            infos.append((path.name, image.info["prompt"], image.info["seed"]))
    assert infos == [("000.png", "one", "5"), ("001.png", "two", "6"), ("002.png", "one", "7"), ("003.png", "two", "8")]
    assert {path: path.stat().st_mtime_ns for path in first} == first
    capsys.readouterr()
    assert lineardit(*generate, tmp_path / "out.png", "--count", "2") == 2
    assert "output must be a folder for 4 pictures, got the file" in capsys.readouterr().err
    assert lineardit(*generate, out, "--count", "100000000") == 2
    assert "less than or equal to 10000" in capsys.readouterr().err


def test_generate_splits_pictures_by_option_or_launcher(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pictures"
    generate = ("generate", base, "one", "two", "three", *SMALL, "-o", out)
    assert lineardit(*generate, "--part", "2/2") == 0
    assert [path.name for path in out.iterdir()] == ["001.png"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, expected in enumerate((out / "000.png", out / "001.png", out / "002.png", "this part has no pictures")):
        monkeypatch.setenv("RANK", str(rank))
        assert lineardit(*generate) == 0
        assert str(expected) in capsys.readouterr().out.splitlines()[-1]
    monkeypatch.delenv("WORLD_SIZE")
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert len(times) == 3
    assert lineardit(*generate) == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    assert lineardit(*generate, "--part", "3/2") == 2


def test_evaluate_writes_table_report_and_sheet(
    base: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a yellow square at the bottom right on striped sky\nno scene\n")
    out = tmp_path / "out"
    assert lineardit("evaluate", base, adapter, "--prompts", prompts, *SMALL, "--no-memory", "-o", out) == 0
    table = capsys.readouterr().out
    for row in (
        "latent MSE",
        "PSNR",
        "SSIM",
        "seconds a picture",
        "seconds a step",
        "peak memory",
        "objects",
        "coherence",
    ):
        assert row in table
    assert caplog.text.count("is truncated to 8 tokens") == 1  # once for both models
    report = json.loads((out / "report.json").read_text())
    assert report["pictures"] == 2
    assert report["student"]["scores"]["objects"][1] == 1
    assert (out / "teacher-student-difference.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["generate", "{base}", "a", "--size", "30x24"], "multiples of 4"),
        (["generate", "{base}", "a", "--steps", "0"], "'--steps': Input should be greater than or equal to 1"),
        (["generate", "{base}", "a", "--dtype", "float64"], "float32, bfloat16, float16"),
        (["generate", "{base}", "a", "--device", "gpu"], "cpu"),
        (["generate", "{base}", "a", "--offload", "some"], "none, model, sequential, group"),
        (["generate", "{base}", "a", "--base", "{base}"], "base (--base) is for adapters"),
        (["generate", "{base}", "a", "-o", "out.gif"], ".png"),
        (["generate", "{base}", "a", "--max-sequence-length", "9999", "-o", "new/out.png"], "cannot be greater"),
        (["generate", "{base}", "a", "--impl", "tield"], "impl must be one of auto, reference, masked, tiled, triton"),
        (["generate", "{base}", "--impl", "nope", "--plan"], "got 'nope'"),
        (["evaluate", "{base}", "missing", "--impl", "nope", "--prompts", __file__, "-o", "out"], "got 'nope'"),
        (["inspect", "{base}", "--impl", "nope"], "got 'nope'"),
        (["generate", "missing", "a"], "missing"),
        (["evaluate", "{base}", "{adapter}", "-o", "out"], "--prompts"),
        (
            ["evaluate", "{base}", "missing", "--prompts", __file__, "-o", "out"],
            "missing is neither a local folder nor a Hub id",
        ),
        (["prepare", "{base}", "--prompts", __file__, "--guidance", "nan", "-o", "out"], "must be finite, got nan"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_commands_refuse_bad_input(
    base: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert lineardit(*(word.format(base=base, adapter=adapter) for word in arguments), "--offline") == 2
    captured = capsys.readouterr()
    assert expected in captured.err.splitlines()[-1]
    assert captured.err.splitlines()[-1].startswith("lineardit: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args", [["a \udcff"], ["a", "--argument", "negative_prompt=\udcff"]], ids=["prompt", "argument"]
)
def test_invalid_utf8_is_refused_before_a_model_is_loaded(
    args: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lineardit("generate", base, *args, *SMALL, "-o", tmp_path / "out.png") == 2
    out, err = capsys.readouterr()
    assert out == "" and "prompts and arguments must be text in UTF-8, got" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out.png", "folder"])
def test_generate_again_keeps_the_picture_and_refuses_changes(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("generate", base, "a", *SMALL, "-o", tmp_path / name)
    picture = tmp_path / name if name == "out.png" else tmp_path / name / "000.png"
    assert lineardit(*command) == 0
    before = picture.stat().st_mtime_ns
    capsys.readouterr()
    assert lineardit(*command) == 0
    assert str(picture) in capsys.readouterr().out.splitlines()[-1]
    assert lineardit(*command, "--argument", "true_cfg_scale=2") == 2
    with monkeypatch.context() as patch:
        patch.setattr("lineardit.commands.loading.load", lambda *_, **__: pytest.fail("a model is loaded"))
        for changed in (("--seed", "1"), ("--steps", "2"), ("--guidance", "3"), ("--size", "24x32")):
            capsys.readouterr()
            assert lineardit(*command, *changed) == 2
            assert capsys.readouterr().err == (
                f"lineardit: {picture} exists, was made with other settings, and is kept: name another output, or "
                "replace it with overwrite (--overwrite)\n"
            )
    assert picture.stat().st_mtime_ns == before
    assert lineardit(*command, "--overwrite") == 0
    assert picture.stat().st_mtime_ns != before


def test_generate_keeps_an_existing_file_unless_overwritten(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    out.write_text("mine")
    assert lineardit("generate", base, "a", *SMALL, "-o", out) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert lineardit("generate", base, "a", *SMALL, "-o", out, "--overwrite") == 0
    with Image.open(out) as image:
        assert image.size == (32, 24)
