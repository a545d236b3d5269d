"""The environment of a run, found without loading torch: the parent process holds no GPU memory."""

import hashlib
import re
import shutil
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .records import Head

ROOT = Path(__file__).parents[2]
SOURCES = ("kernels", "linearize", "pipelines", "lineardit", "benchmarks/gpu")  # what the figures depend on
PACKAGES = ("torch", "triton", "diffusers", "natten")


def describe(*, smoke: bool, impl: str, arguments: list[str]) -> Head:
    """The head of a run's file; raises OSError without an NVIDIA GPU, except for a smoke run."""
    gpu, driver = ("cpu smoke", "none") if smoke else _gpu()
    return Head(
        gpu=gpu,
        date=date.today().isoformat(),
        command=" ".join(["benchmarks/gpu.sh", *arguments]),
        commit=source_version(),
        versions={"python": sys.version.split()[0], "driver": driver, **_versions()},
        smoke=smoke,
        impl=impl,
    )


def file_name(head: Head) -> str:
    """`nvidia-h200-2026-11-21.json`"""
    slug = re.sub(r"[^a-z0-9]+", "-", head.gpu.lower()).strip("-")
    return f"{slug}-{head.date}.json"


def source_version() -> str:
    """The commit, with a digest of the sources if they differ from it or there is no repository."""
    commit = _git("rev-parse", "--short", "HEAD")
    if commit and not _git("status", "--porcelain", "--", *SOURCES):
        return commit
    return f"{commit or 'sources'}-{_digest()}"


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else ""


def _digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def _gpu() -> tuple[str, str]:
    """Name and driver of the first GPU."""
    if shutil.which("nvidia-smi") is None:
        raise OSError("no NVIDIA GPU here (there is no nvidia-smi); --smoke runs on a CPU")
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    if not lines or lines[0].count(",") != 1:
        raise OSError(f"nvidia-smi names no GPU: {lines}; --smoke runs on a CPU")
    name, driver = lines[0].split(",")
    return name.strip(), driver.strip()


def _versions() -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
