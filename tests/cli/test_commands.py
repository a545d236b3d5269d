"""What the commands print and write."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from typer.main import get_command

from lineardit.cli import app, main, run
from lineardit.commands.method_options import field_descriptions, split_arguments
from lineardit.linearize.methods import METHODS


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys\n"
        "from lineardit.cli import run\n"
        "run(['--help'])\n"
        "sys.exit(sorted(m for m in sys.modules if m in {'torch', 'diffusers', 'numpy', 'PIL'}) != [])"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "options", "others"),
    [
        (["BASE", "--radius", "16"], {"radius": 16}, ["BASE"]),
        (["--radius", "2.5", "BASE"], {"radius": 2.5}, ["BASE"]),
        (["--pool-size=4", "-o", "out"], {"pool_size": 4}, ["-o", "out"]),
        (["--radius", "-1"], {"radius": -1}, []),
        (["--layers", "*.attn", "--radius=wide"], {"radius": "wide"}, ["--layers", "*.attn"]),
    ],
)
def test_split_arguments_finds_fields_in_any_position(
    arguments: list[str], options: dict[str, object], others: list[str]
) -> None:
    assert split_arguments(arguments, {"radius", "pool_size"}) == (options, others)


def test_tilde_after_an_equals_sign_is_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(["prepare", "base", "--prompts=~/none.txt", "-o", "~/samples"]) == 2
    assert str(tmp_path / "none.txt") in capsys.readouterr().err


def test_interrupted_command_says_that_it_can_continue(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lineardit.commands.preparation.read_prompts", Mock(side_effect=KeyboardInterrupt))
    assert run(["prepare", "base", "--prompts", "none.txt", "-o", "samples"]) == 130
    assert capsys.readouterr().err == "lineardit: interrupted; run the same command again to continue\n"


def test_interrupted_distillation_prints_no_second_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lineardit.distill.__main__.main", Mock(side_effect=KeyboardInterrupt))
    assert run(["--traceback", "distill", "run.toml"]) == 130
    assert capsys.readouterr().err == ""


def test_unknown_dtype_error_lists_auto(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["decode", "x.latents.safetensors", "--dtype", "int8"]) == 2
    assert "dtype must be auto or one of float32, bfloat16, float16, got 'int8'" in capsys.readouterr().err


@pytest.mark.parametrize("rest", [["-o", "out"], ["--overwrite"], []])
def test_split_arguments_refuses_an_option_without_its_value(rest: list[str]) -> None:
    with pytest.raises(ValueError, match="option --radius needs a value"):
        split_arguments(["BASE", "--radius", *rest], {"radius"})


def test_no_setting_of_a_method_has_the_name_of_an_option() -> None:
    """`convert` would pass that option to the method."""
    command = get_command(app).commands["convert"]
    own_options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {"--method", "--layers", "-o"} <= own_options
    assert not own_options & set(command.method_options())


def test_convert_help_lists_the_options_of_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Options of --method clear" in out
    assert "--pool-tokens <int>" in out
    assert "--window <int>|[<int>,<int>]" in out and "Full side lengths in tokens, odd" in out
    assert "--global METHOD[:SETTING=VALUE,...]" in out


def test_help_describes_every_setting_of_a_method() -> None:
    undescribed = [
        f"{config.__name__}.{field.name}"
        for config in METHODS
        for field in dataclasses.fields(config)
        if not field_descriptions(config).get(field.name)
    ]
    assert undescribed == []


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", ["generate", "upscale", "convert", "prepare", "evaluate", "nearness", "profile"])
def test_help_groups_options_within_the_width(
    command: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert columns - 15 < max(map(len, lines)) <= columns
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings[:2] == ["Arguments:", "Options:"] and "Model:" in headings and len(set(headings)) == len(headings)
    first = lines[lines.index("Options:") + 1 : lines.index("Options:") + 12]
    assert any("--output" in line for line in first)


def test_help_spells_arguments_and_bounds_as_they_are_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for name, command in get_command(app).commands.items():
        assert run([name, "--help"]) == 0
        out = capsys.readouterr().out
        text = out.partition("Options of --method")[0]
        assert not any(part in text for part in ("{", "list[", " range", "<=", ">=", str(2**63 - 1))), text
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                spelled = parameter.metavar if parameter.required else f"[{parameter.metavar}]"
                assert spelled.isascii() and f" {spelled}" in out.splitlines()[0] and f"\n  {spelled}  " in out
    assert run(["upscale", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: lineardit upscale [OPTIONS] PICTURE [ADAPTER_OR_BASE]\n")
    assert "[default: 0; 0 or more]" in out


def test_help_truncates_no_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["--help"]) == 0
    assert not any(line.endswith("...") for line in capsys.readouterr().out.split("Commands:")[1].splitlines())


def test_shell_completion_offers_commands_options_and_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lineardit"])
    monkeypatch.setenv("_LINEARDIT_COMPLETE", "complete_bash")

    def completions(words: str) -> list[str]:
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
        with pytest.raises(SystemExit) as exit_info:
            main()
        assert exit_info.value.code == 0
        return capsys.readouterr().out.split()

    assert completions("lineardit gen") == ["generate"]
    assert completions("lineardit generate --offl") == ["--offline", "--offload"]
    assert completions("lineardit convert base --method proxy") == ["proxytokens"]
    assert "masked" in completions("lineardit generate adapter --impl m")


FLUX_DEV = Path(__file__).parents[1] / "data" / "flux1-dev"  # the real configuration, no weights


@pytest.fixture(scope="module")
def short_flux(tmp_path_factory: pytest.TempPathFactory) -> str:
    """FLUX.1-dev's configuration with one block of each kind, so that counting operations is fast."""
    folder = tmp_path_factory.mktemp("short") / "flux"
    shutil.copytree(FLUX_DEV, folder)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 1, "num_single_layers": 1}))
    return str(folder)


def test_inspect_lists_every_converted_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, report = tmp_path / "adapter", tmp_path / "report.json"
    assert run(["convert", str(FLUX_DEV), "--method", "clear", "--radius", "8", "--offline", "-o", str(adapter)]) == 0
    assert {path.name for path in adapter.iterdir()} == {"lineardit.json"}
    assert f"Wrote {adapter}" in capsys.readouterr().out.replace("\n", "")
    assert run(["inspect", str(adapter), "--offline", "--json", str(report)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "57 of 57 self-attention modules converted" in lines
    assert sum("radius=8" in line for line in lines) == 57
    assert len(json.loads(report.read_text())["rows"]) == 57


def test_inspect_prints_the_json_that_it_writes(
    short_flux: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, report = str(tmp_path / "adapter"), tmp_path / "report.json"
    assert run(["convert", short_flux, "--method", "clear", "--radius", "8", "--offline", "-o", adapter]) == 0
    assert run(["inspect", adapter, "--offline", "--json", str(report)]) == 0
    capsys.readouterr()
    assert run(["inspect", adapter, "--offline", "--json", "-"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(report.read_text()) and len(printed["rows"]) == 2
    assert all(row["settings"] == {"radius": 8} for row in printed["rows"])
    assert all(step["after"] < step["before"] for step in printed["flops"])


def test_convert_stores_dense_below_and_inspect_shows_it(
    short_flux: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, options = str(tmp_path / "adapter"), ["--method", "clear", "--radius", "8", "--offline"]
    assert run(["convert", short_flux, *options, "--dense-below", "16384", "-o", adapter]) == 0
    assert json.loads((tmp_path / "adapter" / "lineardit.json").read_text())["dense_below"] == 16384
    capsys.readouterr()
    assert run(["inspect", adapter, "--offline"]) == 0
    out = capsys.readouterr().out
    assert "original attention in calls with fewer than 16,384 image tokens" in out
    assert "original (fewer than 16,384 image tokens) at 1K, tiled at 2K 4K 8K" in out
    assert run(["convert", adapter, "--dense-below", "9", "--offline", "-o", str(tmp_path / "other")]) == 2
    assert "dense_below of an adapter cannot be changed" in capsys.readouterr().err
    assert run(["convert", short_flux, *options, "--dense-below", "-1", "-o", str(tmp_path / "other")]) == 2
    assert "dense_below must be an integer >= 0, got -1" in capsys.readouterr().err


def test_inspect_truncates_nothing_in_a_pipe(
    short_flux: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--method", "hybrid", "--local", "clear:radius=16", "--global", "proxytokens:num_proxies=1024"]
    options += ["--gate", "1", "--focus-tokens", "1024", "--offline", "-o", str(tmp_path / "a")]
    assert run(["convert", short_flux, *options]) == 0
    capsys.readouterr()
    assert run(["inspect", str(tmp_path / "a"), "--offline"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if "single_transformer_blocks.0.attn" in line)
    assert "proxytokens" in row and "focus_tokens=1024" in row and "…" not in "".join(lines)


@pytest.mark.parametrize("args", [["--version"], ["inspect", "transformer"], ["nosuch"]])
def test_closed_pipe_ends_a_command_quietly(args: list[str], short_flux: str) -> None:
    """Covers output of typer, output of rich, and standard error."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = "stderr" if args == ["nosuch"] else "stdout"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: writer}
    command = [sys.executable, "-m", "lineardit", *args]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(command, cwd=short_flux, env=environment, **streams)  # type: ignore[call-overload]
    os.close(writer)
    assert (result.returncode, result.stdout or b"", result.stderr or b"") == (141, b"", b"")


def test_convert_takes_options_in_any_order(tmp_path: Path) -> None:
    arguments = ["--radius", "8", "--pool-size=4", "--offline", str(FLUX_DEV), "-o", str(tmp_path / "a"), "--layers"]
    assert run(["convert", *arguments, "single_transformer_blocks.*", "--method", "clear"]) == 0
    methods = json.loads((tmp_path / "a" / "lineardit.json").read_text())["methods"]
    assert methods == {"single_transformer_blocks.*.attn": {"method": "clear", "radius": 8, "pool_size": 4}}
