"""A small pipeline in a folder, and a conversion of it."""

from pathlib import Path

import pytest
from diffusers import FluxPipeline
from tiny_distill import build_tiny

from lineardit import Clear, linearize_, save_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = FluxPipeline.from_pretrained(base)
    linearize_(pipe, Clear(radius=2))
    return save_adapter(pipe, tmp_path_factory.mktemp("adapters") / "clear")
