"""What the commands print and write when all is well."""

import subprocess
import sys
from pathlib import Path

import pytest

from lineardit.cli import run
from lineardit.commands.method_options import split_arguments


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
def test_split_arguments_takes_fields_wherever_they_stand(
    arguments: list[str], options: dict[str, object], others: list[str]
) -> None:
    assert split_arguments(arguments, {"radius", "pool_size"}) == (options, others)


def test_convert_help_lists_the_options_of_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Options of --method clear" in out
    assert "--pool-tokens" in out
