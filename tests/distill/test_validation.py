"""Validations that do not finish: interrupted, or out of memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_distill import steps_of, table

from lineardit.distill.config import DistillConfig
from lineardit.distill.train import distill
from lineardit.distill.validation import Validation

MakeConfig = Callable[..., DistillConfig]


def test_interrupted_validation_is_made_on_resume(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(validate={"samples": 2, "every": 2})
    run = Validation.run

    def interrupted(self: Validation, step: int) -> None:
        if step == 6:
            raise KeyboardInterrupt
        run(self, step)

    monkeypatch.setattr(Validation, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill(config)
    monkeypatch.undo()
    file = config.run.folder / "validation.csv"
    assert steps_of(table(file)) == [2, 4]
    for _ in range(2):
        distill(config, resume="latest")
        assert steps_of(table(file)) == [2, 4, 6]
    assert (file.parent / "validation-00000006.png").is_file()


@pytest.mark.parametrize("step", [2, 6])
def test_run_continues_when_validation_runs_out_of_memory(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: int
) -> None:
    """Only that validation is missing, in the middle of the run or at its end."""
    config = make_config(validate={"samples": 2, "every": 2})
    compare, decoded = Validation._compare_pictures, iter(range(1, 100))

    def run_out_of_memory(self: Validation, index: int) -> Any:
        if next(decoded) == step:  # two samples per validation
            raise torch.OutOfMemoryError("CUDA ...")
        return compare(self, index)

    monkeypatch.setattr(Validation, "_compare_pictures", run_out_of_memory)
    assert distill(config).is_dir()
    assert f"validation after step {step} ran out of memory; the run continues without it" in caplog.text
    assert steps_of(table(config.run.folder / "validation.csv")) == [one for one in (2, 4, 6) if one != step]
