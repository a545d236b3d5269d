"""A small pipeline, samples made by it, and settings of a run that takes seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import FluxPipeline
from tiny_distill import PROMPTS, SIZES, build_tiny

from lineardit.distill.config import DistillConfig
from lineardit.distill.config_tables import config_from_tables
from lineardit.distill.prepare import prepare


@pytest.fixture
def pipe() -> FluxPipeline:
    return build_tiny()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline's folder."""
    folder = tmp_path_factory.mktemp("base")
    build_tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve samples of two sizes in three shards."""
    folder = tmp_path_factory.mktemp("data")
    teacher = FluxPipeline.from_pretrained(base)
    return prepare(teacher, PROMPTS, folder, sizes=SIZES, steps=2, max_sequence_length=8, shard_size=5)


@pytest.fixture
def make_config(base: Path, data: Path, tmp_path: Path) -> Callable[..., DistillConfig]:
    """`make_config(run={...}, loss={...})` changes settings of a run of six steps; method and trained are replaced."""

    def make(**tables: dict[str, Any]) -> DistillConfig:
        defaults = {
            "base": {"model": str(base)},
            "data": {"directory": str(data)},
            "method": {"method": "clear", "radius": 2},
            "trained": {"kind": "lora", "rank": 2},
            "optimizer": {"lr": 1e-2},
            "schedule": {"warmup": 2},
            "run": {"directory": str(tmp_path / "run"), "steps": 6, "batch_size": 4},
            "save": {"every": 2},
            "validate": {"samples": 0},
        }
        replaced = {name: table for name, table in tables.items() if name in ("method", "trained")}
        merged = {name: defaults.get(name, {}) | tables.get(name, {}) for name in defaults | tables}
        return config_from_tables(merged | replaced)

    return make
