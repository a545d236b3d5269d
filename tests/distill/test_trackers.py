"""Experiment trackers, in addition to the CSV."""

from collections.abc import Callable
from typing import Any

import pytest
from accelerate import tracking
from accelerate.utils import LoggerType
from tiny_distill import table

from lineardit.distill.config import DistillConfig
from lineardit.distill.train import distill


class RecordingTracker(tracking.GeneralTracker):
    """A tracker that records what it is given."""

    name = "tensorboard"
    requires_logging_directory = True
    created: list["RecordingTracker"]

    def __init__(self, run_name: str, logging_dir: str, **_: Any) -> None:
        super().__init__()
        self.where = run_name, str(logging_dir)
        self.settings: dict[str, Any] = {}
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.finished = False
        self.created.append(self)

    @property
    def tracker(self) -> "RecordingTracker":
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch) -> list[RecordingTracker]:
    """The trackers that runs create, as if TensorBoard were installed."""
    created: list[RecordingTracker] = []
    monkeypatch.setattr(RecordingTracker, "created", created, raising=False)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", RecordingTracker)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    return created


def test_tracker_gets_the_settings_and_the_values_of_the_csv(
    make_config: Callable[..., DistillConfig], trackers: list[RecordingTracker]
) -> None:
    config = make_config(
        run={"steps": 4}, save={"report_to": ["tensorboard"]}, validate={"samples": 1, "every": 2}, trained={"rank": 3}
    )
    distill(config)
    (tracker,) = trackers
    folder = config.run.folder
    assert tracker.where == ("lineardit", str(folder)) and tracker.finished
    assert tracker.settings["trained.rank"] == 3 and tracker.settings["optimizer.betas"] == "(0.9, 0.999)"
    names = ("flow", "prediction", "attention", "loss", "lr")
    step_rows = [{"step": step, **row} for step, row in tracker.rows if "loss" in row]
    assert step_rows == [{name: row[name] for name in ("step", *names)} for row in table(folder / "loss.csv")]
    validations = [(step, row["validation/latent_mse"]) for step, row in tracker.rows if "loss" not in row]
    assert validations == [(row["step"], row["latent_mse"]) for row in table(folder / "validation.csv")]
    assert [step for step, _ in validations] == [2, 4]


def test_run_resumes_with_other_trackers(
    make_config: Callable[..., DistillConfig], trackers: list[RecordingTracker]
) -> None:
    distill(make_config(run={"steps": 2}))
    assert not trackers
    distill(make_config(run={"steps": 4}, save={"report_to": ["tensorboard"]}), resume="latest")
    assert [step for step, _ in trackers[0].rows] == [3, 4]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wand", "must be one or more of aim, .*, wandb, got 'wand'"),
        ("wandb", "names wandb, which is not installed: pip install"),
    ],
)
def test_unknown_or_missing_tracker_is_refused_before_the_run(
    name: str, message: str, make_config: Callable[..., DistillConfig], trackers: list[RecordingTracker]
) -> None:
    config = make_config(save={"report_to": [name]})
    with pytest.raises(ValueError, match=rf"save\.report_to {message}"):
        distill(config)
    assert not config.run.folder.exists()
