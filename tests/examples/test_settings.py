"""The settings that people copy are settings that distillation takes."""

from pathlib import Path

import pytest

from lineardit.distill.config import load_config

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("file", sorted(EXAMPLES.rglob("*.toml")), ids=lambda file: file.name)
def test_load_config_takes_the_example(file):
    assert load_config(file).run.steps > 0
