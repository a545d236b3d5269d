"""A run's precision is chosen by what is faster on the machine."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lineardit.distill import precision
from lineardit.distill.config import DistillConfig

CPU = torch.device("cpu")
MakeConfig = Callable[..., DistillConfig]


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"run": {"mixed_precision": "no"}}, {True: False, False: False}),
        ({"run": {"mixed_precision": "auto"}}, {True: True, False: False}),
        ({"run": {"mixed_precision": "bf16"}}, {True: True, False: True}),
        ({"run": {"mixed_precision": "auto"}, "base": {"dtype": "bfloat16"}}, {True: True, False: True}),
    ],
    ids=["no", "auto", "bf16", "auto-bfloat16-base"],
)
def test_uses_autocast_follows_the_setting_and_the_machine(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    expected: dict[bool, bool],
    faster: bool,
) -> None:
    monkeypatch.setattr(precision, "bfloat16_is_faster", lambda device_type: faster)
    with caplog.at_level(logging.WARNING):
        assert precision.uses_autocast(make_config(**settings), CPU) == expected[faster]
    forced = settings["run"]["mixed_precision"] == "bf16" and not faster
    assert ("slower than float32 on this CPU" in caplog.text) == forced


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
def test_bfloat16_is_faster_compares_both_dtypes(monkeypatch: pytest.MonkeyPatch, slow: torch.dtype) -> None:
    monkeypatch.setattr(precision, "_seconds", lambda left, right: 2.0 if left.dtype == slow else 1.0)
    assert precision.bfloat16_is_faster.__wrapped__("cpu") == (slow == torch.float32)
