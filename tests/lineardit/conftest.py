"""A tiny pipeline as a folder, and distillation in this process instead of a launched one."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tiny_distill import build_tiny

from lineardit.distill.config_tables import load_config
from lineardit.distill.train import distill


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def launched() -> list[list[str]]:
    """Overrides of each distillation that `launch_here` ran."""
    return []


@pytest.fixture
def launch_here(launched: list[list[str]]) -> Callable[[Path, Sequence[str]], int]:
    def launch(config: Path, options: Sequence[str] = ()) -> int:
        assert list(options[:2]) == ["--resume", "latest"]
        launched.append(list(options[3::2]))
        distill(load_config(config, options[3::2]), resume="latest")
        return 0

    return launch
