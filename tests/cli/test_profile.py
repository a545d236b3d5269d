"""`lineardit profile`, then `lineardit convert --from-profile` on its output, on the command line."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny_distill import build_tiny

from lineardit.cli import run
from lineardit.commands.profile import show
from lineardit.distill import figures
from lineardit.linearize.measures.attention_profile import read_profile

FLUX_DEV = Path(__file__).parents[1] / "data" / "flux1-dev"  # the real configuration, no weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and its profile."""
    folder = tmp_path_factory.mktemp("profile")
    build_tiny().save_pretrained(folder / "base")
    (folder / "prompts.txt").write_text("a red circle\n# not this\na blue cross\n")
    args = ["--prompts", folder / "prompts.txt", "--size", "32x24", "--radii", "1.5,2,3", "--steps", "2"]
    args += ["--max-sequence-length", "8", "--offline", "-o", folder / "out", "--method", "agent:num_agents=4"]
    args += ["--method", 'hybrid:local={"method":"clear","radius":2},global={"method":"mala"},gate=1']
    assert run(["profile", *map(str, [folder / "base", *args])]) == 0
    return folder


def convert(folder: Path, *options: str, base: Path | None = None) -> list[str]:
    profile = str(folder / "out" / "profile.json")
    return ["convert", str(base or folder / "base"), "--from-profile", profile, "--offline", *options]


def test_profile_writes_figures_and_a_picture(folder: Path) -> None:
    profile = json.loads((folder / "out" / "profile.json").read_text())
    assert profile["base"] == str(folder / "base")
    assert (profile["prompts"], profile["radii"], profile["size"]) == (2, [1.5, 2, 3], [24, 32])
    assert [layer["module"] for layer in profile["layers"]] == [
        "transformer_blocks.0.attn",
        "single_transformer_blocks.0.attn",
    ]
    with Image.open(folder / "out" / "profile.png") as picture:
        assert min(picture.size) > 200
    assert {path.name for path in (folder / "out").iterdir()} == {"profile.json", "profile.png"}


def test_profile_keeps_existing_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["profile", str(folder / "base"), "--prompts", str(folder / "prompts.txt"), "-o", str(folder / "out")]
    assert run([*args, "--offline"]) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["profile", "nearness"])
def test_missing_matplotlib_is_reported_before_measuring(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda _: None)
    base, prompts, out = (str(path) for path in (folder / "base", folder / "prompts.txt", tmp_path / "out"))
    assert run([command, base, *([base] if command == "nearness" else []), "--prompts", prompts, "-o", out]) == 2
    assert f"{command}.png is drawn with matplotlib, which is not installed" in capsys.readouterr().err


def test_convert_from_profile_writes_an_adapter_within_the_budget(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    options = ["--budget", "radius:2", "--budget-size", "512x256", "--choices", "1.5,2,3", "-o", str(adapter)]
    assert run(convert(folder, *options)) == 0
    assert "operations at 512x256" in capsys.readouterr().out
    methods = json.loads((adapter / "lineardit.json").read_text())["methods"]
    assert {config["method"] for config in methods.values()} == {"clear"}
    assert {config["radius"] for config in methods.values()} <= {1.5, 2, 3}
    assert run(["inspect", str(adapter), "--offline"]) == 0


def test_convert_from_profile_mixes_methods(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "adapter"
    assert run(convert(folder, "--budget", "0.99", "--choices", "agent,hybrid", "-o", str(adapter))) == 0
    assert 'x hybrid:local={"method":"clear","radius":2},global={"method":"mala"},gate=1' in capsys.readouterr().out
    methods = json.loads((adapter / "lineardit.json").read_text())["methods"]
    assert {config["method"] for config in methods.values()} <= {"agent", "hybrid"}
    assert sum(config["method"] == "hybrid" for config in methods.values()) > 0


def test_profile_shows_errors_of_windows_and_methods(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(read_profile(folder / "out" / "profile.json"))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert printed.count("single_transformer_blocks.0.attn") == 2  # in full in both tables
    assert "a: agent:num_agents=4" in printed and 'b: hybrid:local={"method":"clear","radius":2}' in printed


@pytest.mark.parametrize(
    ("method", "message"), [("agnt:num_agents=4", "did you mean agent"), ("agent:4", "METHOD:SETTING=VALUE")]
)
def test_profile_refuses_an_invalid_method(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, message: str
) -> None:
    args = ["profile", str(folder / "base"), "--prompts", str(folder / "prompts.txt"), "--method", method]
    assert run([*args, "--offline", "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_profile_names_the_radii_option_in_its_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["profile", str(folder / "base"), "--prompts", str(folder / "prompts.txt"), "--radii", "2,x", "--offline"]
    assert run(args) == 2
    assert capsys.readouterr().err.startswith("lineardit: --radii must be numbers separated by commas")


def test_table_titles_are_not_wrapped_at_the_table_width(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lineardit.commands.tables.UNLIMITED_WIDTH", 40)
    show(read_profile(folder / "out" / "profile.json"))
    title = "|converted - original|^2 / |original|^2 of a layer's attention"
    assert title in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["--from-profile FILE and --budget"]),
        (["--budget", "much"], ["budget must be a share", "'much'"]),
        (["--budget", "radius:2", "--method", "clear", "--radius", "2"], ["--from-profile chooses"]),
        (["--budget", "radius:2", "--layers", "single*"], ["--from-profile chooses"]),
        (["--budget", "radius:2", "--choices", "4"], ["'4' was not profiled", "1.5, 2, 3, agent, hybrid, full"]),
        (["--budget", "1e-9"], ["the cheapest choices need"]),
    ],
)
def test_convert_from_profile_refuses_bad_options(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: list[str]
) -> None:
    assert run(convert(folder, *options, "-o", str(tmp_path / "adapter"))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in expected)
    assert not (tmp_path / "adapter").exists()


def test_convert_refuses_a_profile_of_another_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "config.json").write_text((folder / "base" / "transformer" / "config.json").read_text())
    for base in (FLUX_DEV, tmp_path / "copy"):
        assert run(convert(folder, "--budget", "radius:2", "-o", str(tmp_path / "adapter"), base=base)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "of another model" in error and str(base) in error


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 1}', '{"format": 2}'])
def test_convert_refuses_a_damaged_profile(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    file = tmp_path / "profile.json"
    file.write_text(content)
    args = ["convert", str(folder / "base"), "--from-profile", str(file), "--budget", "0.5", "-o", str(tmp_path / "a")]
    assert run(args) == 2
    assert str(file) in capsys.readouterr().err
