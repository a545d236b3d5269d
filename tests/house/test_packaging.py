"""One import name over the repository's folders: in a checkout of any name, installed, and as a wheel."""

import importlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lineardit.linearize.advice import TESTED_DIFFUSERS

ROOT = Path(__file__).parents[2]
FOLDERS = ("lineardit", "kernels", "linearize", "pipelines", "distill", "examples")
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def package_name(folder: Path) -> str:
    parts = folder.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "lineardit" else ("lineardit", *parts))


def source_files() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def module_names() -> list[str]:
    """Every module of the package except programs and example scripts, which would run when imported."""
    names = []
    for path in source_files():
        if path.stem == "__main__" or (path.parent == ROOT / "examples" and path.stem != "__init__"):
            continue
        package = package_name(path.parent)
        names.append(package if path.stem == "__init__" else f"{package}.{path.stem}")
    return names


def run_python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    """Standard output of a fresh interpreter; fails the test with its standard error."""
    environment = os.environ | {"PYTHONPATH": str(path or "")}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout in a folder whose name is not a Python identifier."""
    target = tmp_path_factory.mktemp("clones") / "a-b"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "demo", "runs", "results")
    shutil.copytree(ROOT, target, ignore=lambda folder, names: ignored(folder, names) - {"demo.py"})
    return target


def test_package_list_equals_the_folders() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted({package_name(path.parent) for path in source_files()})


def data_files() -> set[Path]:
    """Files of the package that are not Python code."""
    files = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {path for path in files if path.suffix not in {".py", ".pyc"}}


def test_package_data_covers_every_file() -> None:
    folder_of = {package_name(path.parent): path.parent for path in source_files()}
    patterns = SETUPTOOLS["package-data"].items()
    covered = {file for package, globs in patterns for glob in globs for file in folder_of[package].glob(glob)}
    assert data_files() - covered == set()


def pins(file: str) -> dict[str, str]:
    """{package: version} of a constraints file."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    return {name.replace("_", "-").lower(): version for name, version in (line.split("==") for line in lines)}


def test_tested_versions_agree() -> None:
    """Both constraints files are within the declared bounds, and the warning at conversion uses the same versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest, newest = pins("constraints-oldest.txt"), pins("constraints.txt")
    for requirement in map(Requirement, project["dependencies"]):
        assert newest[requirement.name] in requirement.specifier
        assert oldest[requirement.name] in requirement.specifier
    assert (oldest["diffusers"], newest["diffusers"]) == TESTED_DIFFUSERS
    assert f"diffusers>={oldest['diffusers']}" in project["dependencies"]


def test_kernels_is_not_a_regular_package() -> None:
    """diffusers imports a package called `kernels`; a folder with an `__init__.py` would take its place."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_other_packages_called_kernels_are_not_shadowed(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("owner = 'another project'\n")
    assert run_python("-c", "import kernels; print(kernels.owner)", cwd=ROOT, path=tmp_path) == "another project\n"


def test_modules_have_one_name() -> None:
    for name in module_names():
        importlib.import_module(name)
    names_of = defaultdict(list)
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/")
        if file.is_relative_to(ROOT) and not file.is_relative_to(sys.prefix):
            names_of[file].append(name)
    assert {file: names for file, names in names_of.items() if len(names) > 1} == {}
    assert set(module_names()) <= {name for names in names_of.values() for name in names}


def test_import_is_light() -> None:
    code = (
        "import sys, lineardit, lineardit.cli; print([m for m in ('torch', 'diffusers', 'numpy') if m in sys.modules])"
    )
    assert run_python("-c", code, cwd=ROOT) == "[]\n"


def test_clone_runs_inside_its_root(clone: Path) -> None:
    code = "import lineardit.examples as e; print(e.__file__)"
    assert run_python("-c", code, cwd=clone) == f"{clone / 'examples' / '__init__.py'}\n"
    assert "convert" in run_python("-m", "lineardit", "--help", cwd=clone)


def test_clone_runs_outside_its_root(clone: Path, tmp_path: Path) -> None:
    code = "import lineardit.examples as e; print(e.__file__)"
    assert run_python("-c", code, cwd=tmp_path, path=clone) == f"{clone / 'examples' / '__init__.py'}\n"
    assert "convert" in run_python("-m", "lineardit", "--help", cwd=tmp_path, path=clone)


def test_clone_called_lineardit_runs_from_its_parent_folder(clone: Path, tmp_path: Path) -> None:
    """There Python finds the checkout itself first, as a folder called lineardit."""
    (tmp_path / "lineardit").symlink_to(clone)
    code = "import lineardit, lineardit.kernels.window, lineardit.examples as e; print(lineardit.Clear, e.__file__)"
    expected = (
        f"<class 'lineardit.linearize.methods.clear.Clear'> {tmp_path / 'lineardit' / 'examples' / '__init__.py'}\n"
    )
    assert run_python("-c", code, cwd=tmp_path) == expected
    assert "convert" in run_python("-m", "lineardit", "--help", cwd=tmp_path)


def test_clone_runs_plain_pytest(clone: Path) -> None:
    script = "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main(sys.argv[1:]))"  # as the console script
    assert " passed" in run_python("-c", script, "-q", "-k", "are_found", "tests/house/test_imports.py", cwd=clone)


@pytest.mark.slow
def test_wheel_holds_every_module_and_runs(clone: Path, tmp_path: Path) -> None:
    run_python(
        "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(clone), cwd=clone
    )
    (wheel,) = tmp_path.glob("lineardit-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    expected = {
        f"{package_name(path.parent).replace('.', '/')}/{path.name}" for path in {*source_files(), *data_files()}
    }
    assert expected <= names
    assert not {name for name in names if name.startswith(("tests/", "benchmarks/", "kernels/"))}
    code = "import lineardit; print(lineardit.Clear(radius=2).radius, lineardit.__file__)"
    assert run_python("-c", code, cwd=tmp_path, path=tmp_path / "site").split() == [
        "2",
        str(tmp_path / "site" / "lineardit" / "__init__.py"),
    ]


@pytest.mark.skipif(not Path(sys.prefix, ".installed").exists(), reason="only in the environment that make makes")
def test_installed_package_is_found_anywhere(tmp_path: Path) -> None:
    code = "import lineardit.examples as e; print(e.__file__)"
    assert run_python("-c", code, cwd=tmp_path) == f"{ROOT / 'examples' / '__init__.py'}\n"
