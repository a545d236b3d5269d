"""Commands, names, links and paths in README.md, CONTRIBUTING.md and docs/ exist."""

import ast
import re
import shlex
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import typer.main

import lineardit
from lineardit.cli import app
from lineardit.commands.method_options import MethodCommand
from lineardit.distill.config import DistillConfig

ROOT = Path(__file__).parents[2]
PAGES = {
    str(page.relative_to(ROOT)): page.read_text()
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def shell_lines(program: str) -> list[str]:
    """Every line of the pages' shell blocks that starts with `program`."""
    blocks = [block.replace("\\\n", "") for text in PAGES.values() for block in code_blocks(text, "bash")]
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(program + " ")]


def options_of(name: str) -> set[str]:
    command = COMMANDS[name]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return options | set(command.method_options() if isinstance(command, MethodCommand) else ())


@pytest.mark.parametrize("line", shell_lines("lineardit"))
def test_readme_commands_and_their_options_exist(line: str) -> None:
    _, name, *words = shlex.split(line, comments=True)
    assert name in COMMANDS
    assert {word.partition("=")[0] for word in words if word.startswith("-")} <= options_of(name)


def test_readme_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        target for text in PAGES.values() for target in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", text, re.M)
    }
    assert {first or second for first, second in named} - targets == set()


@pytest.mark.parametrize("page", PAGES)
def test_readme_links_exist(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", text, flags=re.MULTILINE)
    return {re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_paths_exist() -> None:
    folders = "|".join(entry.name for entry in ROOT.iterdir() if entry.is_dir())
    mentioned = {path for text in PAGES.values() for path in re.findall(rf"`((?:{folders})/[a-z_./]*)`", text)}
    words = {word for line in shell_lines("accelerate") for word in shlex.split(line, comments=True)}
    launched = {word for word in words if word.startswith("examples/")}
    assert mentioned and launched
    assert {path for path in mentioned | launched if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("block", [block for text in PAGES.values() for block in code_blocks(text, "python")])
def test_readme_python_uses_names_that_exist(block: str) -> None:
    names = [
        node.attr
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lineardit"
    ]
    assert [name for name in names if not hasattr(lineardit, name)] == []


def test_docs_describe_every_distillation_setting() -> None:
    rows = dict(re.findall(r"^\| `\[(\w+)\]` \| (.*) \|$", PAGES["docs/distillation.md"], flags=re.MULTILINE))
    hints = get_type_hints(DistillConfig)
    assert rows.keys() == hints.keys()
    for table, text in rows.items():
        classes = [] if table == "method" else get_args(hints[table]) or [hints[table]]
        for setting in (setting for cls in classes for setting in fields(cls)):
            assert re.search(rf"`{setting.name}[` =]", text), f"{table}.{setting.name}"
            if type(setting.default) in (float, int, str):
                values = re.findall(rf"`{setting.name} = ([^`]+)`", text)
                assert setting.default in [tomllib.loads(f"value = {value}")["value"] for value in values], setting.name
