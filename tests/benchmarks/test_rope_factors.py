"""The benchmark of RoPE factors: its rules, and one small picture."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from lineardit.examples.tiny_flux import path
from lineardit.linearize.adapters.opening import open_pipeline
from lineardit.pipelines.planning import ntk_factor


@pytest.fixture
def rope_factors(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("rope_factors")


def test_ramp_rises_from_one_to_the_ntk_factor(rope_factors: Any) -> None:
    known, between, far = (rope_factors.factors(ratio, 12) for ratio in (2.0, 3.0, 4.0))
    assert known["ramp"] == known["one"] == known["known"] == 1
    assert 1 < between["ramp"] < between["native"] == ntk_factor(3.0, 12)
    assert far["ramp"] == far["native"]


def test_errors_differ_where_factors_do(rope_factors: Any) -> None:
    errors = rope_factors.errors(open_pipeline(path()), 0, (32, 288))
    assert len(set(errors.values())) == len(errors) == 4
    assert 0 < max(errors.values()) < 1
