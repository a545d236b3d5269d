"""Imports between the folders go one way, by the table in CONTRIBUTING.md."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "kernels": {"kernels"},
    "linearize": {"linearize", "kernels"},
    "pipelines": {"pipelines", "linearize", "kernels"},
    "distill": {"distill", "pipelines", "linearize", "kernels"},
    "examples": {"examples", "pipelines", "distill", "linearize", "kernels", "lineardit"},
    "lineardit": {"lineardit", "examples", "pipelines", "distill", "linearize", "kernels"},
}
PACKAGE_OF_MODULE = {"PIL": "pillow", "yaml": "pyyaml"}
SOURCES = [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Absolute names of everything that `source`, a module of `package`, imports, anywhere in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def package_of(path: Path) -> str:
    """`lineardit.kernels.window` for kernels/window/tiled.py."""
    parts = path.relative_to(ROOT).parent.parts
    return ".".join(parts if parts[0] == "lineardit" else ("lineardit", *parts))


def folder_of(module: str) -> str | None:
    """The top folder that a module of this package lives in; None for other packages."""
    parts = module.split(".")
    if parts[0] != "lineardit":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "lineardit"


def backward_imports(source: str, package: str) -> list[str]:
    allowed = {None, *MAY_IMPORT[folder_of(package) or ""]}
    modules = (name for name in imported_modules(source, package) if name != "lineardit.__version__")
    return [name for name in modules if folder_of(name) not in allowed]


def test_imports_go_one_way() -> None:
    backward = {str(path): backward_imports(path.read_text(), package_of(path)) for path in SOURCES}
    assert {path: names for path, names in backward.items() if names} == {}


def test_folders_import_each_other_relatively() -> None:
    """Except examples, which people copy: they import the installed package."""
    absolute: dict[str, list[str]] = {}
    for path in SOURCES:
        if path.is_relative_to(ROOT / "examples"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            if own_names := [name for name in names if name.split(".")[0] in MAY_IMPORT]:
                absolute.setdefault(str(path), []).extend(own_names)
    assert absolute == {}


def test_kernels_import_only_torch_and_triton() -> None:
    allowed = {"torch", "triton", "lineardit", *sys.stdlib_module_names}
    for path in (ROOT / "kernels").rglob("*.py"):
        roots = {module.split(".")[0] for module in imported_modules(path.read_text(), package_of(path))}
        assert roots <= allowed, path


def test_every_import_is_a_declared_dependency() -> None:
    """No import relies on what another package happens to install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    declared = {re.split(r"[<>=\[; ]", requirement)[0] for requirement in required}
    modules = {name.split(".")[0] for path in SOURCES for name in imported_modules(path.read_text(), package_of(path))}
    packages = {PACKAGE_OF_MODULE.get(name, name.replace("_", "-")) for name in modules - sys.stdlib_module_names}
    assert packages - declared - {"lineardit"} == set()


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("from ..linearize.seam import x", "lineardit.kernels", ["lineardit.linearize.seam.x"]),
        ("from ...distill import losses", "lineardit.linearize.methods", ["lineardit.distill.losses"]),
        ("def f():\n    from .. import Clear", "lineardit.distill", ["lineardit.Clear"]),
        ("import lineardit.distill.prepare", "lineardit.pipelines", ["lineardit.distill.prepare"]),
        ("from ..kernels.window import window_attention", "lineardit.linearize", []),
        ("from .seam import x\nimport torch", "lineardit.linearize", []),
    ],
)
def test_backward_imports_are_found(source: str, package: str, expected: list[str]) -> None:
    assert backward_imports(source, package) == expected


def test_star_import_gives_the_public_names() -> None:
    names: dict[str, Any] = {}
    exec("from lineardit import *", names)
    assert {"linearize_", "dense", "restore_", "Clear", "HighResolutionPipeline", "from_pretrained"} <= names.keys()
    assert "Path" not in names
