"""Resuming a run: after kill -9, after a NaN, with other settings, from damaged checkpoints."""

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_distill import assert_same_weights, launch_run, loss_rows, steps_of, table, write_config

from lineardit import from_pretrained
from lineardit.distill import checkpoint, precision, trainer
from lineardit.distill.checkpoint import Resume, latest_checkpoint, load_checkpoint
from lineardit.distill.config import DistillConfig
from lineardit.distill.diverged import DivergedError
from lineardit.distill.runs import check_run, write_run
from lineardit.distill.train import distill
from lineardit.distill.trainer import Trainer
from lineardit.linearize.locks import folder_lock

MakeConfig = Callable[..., DistillConfig]


def kill(config: DistillConfig, file: Path, *, before: int, processes: int = 1) -> None:
    """Start this run, and kill its process group after a random step."""
    csv_file = config.run.folder / "loss.csv"
    process = launch_run(file, processes=processes)
    kill_after = random.Random(time.time_ns()).randrange(4, before)
    while process.poll() is None and not (csv_file.is_file() and len(csv_file.read_text().splitlines()) > kill_after):
        time.sleep(0.002)
    assert process.poll() is None, f"finished before it could be killed after step {kill_after}"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (config.run.folder / "adapter").exists(), f"finished before it could be killed after step {kill_after}"


@pytest.mark.parametrize(
    "trained",
    [
        pytest.param({"kind": "lora", "rank": 2}, id="lora"),
        pytest.param({"kind": "attention"}, id="attention", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_run_ends_in_the_same_weights(
    trained: dict[str, Any], make_config: MakeConfig, tmp_path: Path
) -> None:
    steps = {"steps": 60, "batch_size": 2}
    config = make_config(trained=trained, run=steps, save={"every": 3})
    uninterrupted = make_config(
        trained=trained, run=steps | {"directory": str(tmp_path / "whole")}, save={"every": 1000}
    )
    kill(config, write_config(config, tmp_path / "config.toml"), before=50)
    distill(config, resume="latest")
    distill(uninterrupted)
    assert steps_of(loss_rows(config.run.folder)) == list(range(1, 61))
    assert_same_weights(config.run.folder, uninterrupted.run.folder)


@pytest.mark.slow
def test_two_processes_killed_and_resumed_end_in_the_same_weights(make_config: MakeConfig, tmp_path: Path) -> None:
    tables: dict[str, Any] = {"layerwise": {"steps": 2, "lr": 1e-2}, "save": {"every": 3}}
    tables["trained"] = {"kind": "lora", "rank": 2, "ema": 0.9}
    steps = {"steps": 40, "batch_size": 2}
    config, uninterrupted = (
        make_config(**tables, run=steps | {"directory": str(tmp_path / name)}) for name in ("killed", "whole")
    )
    file = write_config(config, tmp_path / "killed.toml")
    kill(config, file, before=30, processes=2)
    for process in (
        launch_run(file, "--resume", "latest", processes=2),
        launch_run(write_config(uninterrupted, tmp_path / "whole.toml"), processes=2),
    ):
        assert process.wait() == 0, process.stderr.read().decode()
    assert steps_of(loss_rows(config.run.folder)) == list(range(1, 43))
    assert_same_weights(config.run.folder, uninterrupted.run.folder)


def test_run_started_before_a_setting_existed_is_resumed(make_config: MakeConfig) -> None:
    config = make_config(run={"steps": 2})
    distill(config)
    record = config.run.folder / "run.json"
    stored = json.loads(record.read_text())
    del stored["run"]["min_tokens"], stored["layerwise"]
    record.write_text(json.dumps(stored))
    check_run(config, stored["samples"], resume="latest")
    with pytest.raises(ValueError, match=r"run.min_tokens was 0, now 7"):
        check_run(make_config(run={"steps": 2, "min_tokens": 7}), stored["samples"], resume="latest")


def test_non_finite_loss_stops_the_run(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config, terms = make_config(), trainer.loss_terms
    run = config.run.folder

    def broken(*arguments: Any) -> dict[str, torch.Tensor]:
        losses = terms(*arguments)
        return losses | {"prediction": losses["prediction"] * float("nan")} if len(loss_rows(run)) == 4 else losses

    monkeypatch.setattr(trainer, "loss_terms", broken)
    last = r"the last checkpoint, .*step-00000004, .* --set optimizer.lr=0.003"
    with pytest.raises(DivergedError, match=f"prediction is nan at step 5; continue from {last}"):
        distill(config)
    assert steps_of(loss_rows(run)) == [1, 2, 3, 4]
    assert all(tensor.isfinite().all() for tensor in load_file(run / "step-00000004" / "trained.safetensors").values())
    assert not (run / "adapter").exists()
    monkeypatch.undo()
    from_pretrained(run / "step-00000004" / "adapter")
    lower = make_config(optimizer={"lr": 3e-3, "betas": [0.8, 0.9]}, run={"steps": 5})
    distill(lower, resume="latest")
    assert steps_of(loss_rows(run)) == [1, 2, 3, 4, 5]
    assert loss_rows(run)[4]["lr"] < 3e-3 < loss_rows(run)[1]["lr"]


def test_resume_skips_incomplete_checkpoints(make_config: MakeConfig) -> None:
    config = make_config(schedule={"kind": "constant", "warmup": 0}, save={"every": 2, "keep_last": 3})
    distill(config)
    run = config.run.folder
    (run / "step-00000006" / "optimizer.safetensors").write_bytes(b"short")
    (run / ".step-00000007.tmp").mkdir()
    assert latest_checkpoint(run) == (run / "step-00000004", 4)
    shutil.rmtree(run / "step-00000006")
    longer = make_config(schedule={"kind": "constant", "warmup": 0}, run={"steps": 8})
    distill(longer, resume="latest")
    assert sorted(path.name for path in run.glob("*step-*")) == ["step-00000006", "step-00000008"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": {"flow": 2}}, "loss.flow was 1.0, now 2.0"),
        (
            {"trained": {"kind": "attention"}},
            "trained.kind was 'lora', now 'attention'",
        ),
        ({"noise": {"mean": 1.0}}, "noise.mean was 0.0, now 1.0"),
        ({"layerwise": {"steps": 7}}, "layerwise.steps was 0, now 7"),
        ({"run": {"seed": 1, "batch_size": 6}}, "run.batch_size was 4, now 6; run.seed was 0, now 1"),
    ],
)
def test_resume_refuses_changed_settings(change: dict[str, Any], message: str, make_config: MakeConfig) -> None:
    write_run(make_config(), "samples", mixed=False)
    with pytest.raises(ValueError, match=f"was started with other settings: .*({message})"):
        check_run(make_config(**change), "samples", resume="latest")
    check_run(make_config(run={"gradient_accumulation": 2}, save={"every": 9}), "samples", resume="latest")
    with pytest.raises(ValueError, match="samples was 'samples', now 'others'"):
        check_run(make_config(), "others", resume="latest")


def test_resume_logs_and_records_allowed_changes_of_settings(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    write_run(make_config(), "samples", mixed=False)
    write_run(make_config(), "samples", mixed=False)  # nothing changed: no message
    config = make_config(optimizer={"lr": 1e-3})
    check_run(config, "samples", resume="latest")
    write_run(config, "samples", mixed=False)
    change = "optimizer.lr was 0.01, now 0.001"
    assert [record.getMessage() for record in caplog.records] == [
        f"{config.run.directory} continues after step 0 with other settings: {change}"
    ]
    record = json.loads((config.run.folder / "run.json").read_text())
    assert record["history"] == [{"after_step": 0, "changed": [change]}]
    check_run(config, "samples", resume="latest")


@pytest.mark.parametrize(("name", "value"), [("history", None), ("history", {"a": 1}), ("bfloat16", "yes")])
def test_resume_refuses_a_damaged_run_record(name: str, value: Any, make_config: MakeConfig) -> None:
    write_run(make_config(), "samples", mixed=False)
    record = make_config().run.folder / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {name: value}))
    with pytest.raises(
        ValueError, match=rf"run.json is damaged: {name} must be .*, got .*: repair it, or remove that entry"
    ):
        check_run(make_config(), "samples", resume="latest")


def test_resume_refuses_fewer_steps_than_already_made(make_config: MakeConfig) -> None:
    distill(make_config(run={"steps": 4}))
    with pytest.raises(ValueError, match=r"run.steps must be >= 4, the step after which the run continues, got 3"):
        distill(make_config(run={"steps": 3}), resume="latest")


@pytest.mark.parametrize("unwritable", ["save_file", "save_adapter"])
def test_full_disk_leaves_no_partial_checkpoint(
    unwritable: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, write = make_config(), getattr(checkpoint, unwritable)

    def full(*arguments: Any, **options: Any) -> None:
        if "step-00000004" in str(arguments[1]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*arguments, **options)

    monkeypatch.setattr(checkpoint, unwritable, full)
    with pytest.raises(
        OSError, match=r"step-00000004 cannot be written \(.*No space left.*\): free space, and continue with"
    ):
        distill(config)
    run = config.run.folder
    assert sorted(path.name for path in run.iterdir()) == ["loss.csv", "run.json", "step-00000002"]
    monkeypatch.undo()
    distill(config, resume="latest")
    assert steps_of(loss_rows(run)) == [1, 2, 3, 4, 5, 6]


def test_resume_keeps_the_precision_of_the_run(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """With "auto", a measurement decides, and its result may differ on resume."""
    chosen = []
    start = Trainer.__init__

    def record(self: Trainer, *arguments: Any, mixed: bool) -> None:
        chosen.append(mixed)
        start(self, *arguments, mixed=mixed)

    monkeypatch.setattr(Trainer, "__init__", record)
    for steps, faster in ((2, True), (3, False)):
        monkeypatch.setattr(precision, "bfloat16_is_faster", lambda _, faster=faster: faster)
        distill(make_config(run={"steps": steps, "mixed_precision": "auto"}), resume="latest")
    assert chosen == [True, True]


def test_resume_at_an_earlier_checkpoint_discards_later_ones(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Interrupted again, it resumes on the new path, and ends with the weights of an uninterrupted run."""
    tables: dict[str, Any] = {"save": {"every": 2, "keep_last": 3}, "validate": {"samples": 2, "every": 3}}
    config = make_config(**tables)
    run, step = config.run.folder, Trainer.step
    distill(config)
    shutil.copytree(run, run.with_name("as it was"))
    message = r"--resume must be latest or .* complete checkpoint in .*run \(2, 4, 6\), got 3"
    with pytest.raises(ValueError, match=message):
        distill(config, resume=3)

    def interrupted(self: Trainer, number: int) -> dict[str, float]:
        if number == 4:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill(make_config(**tables, optimizer={"lr": 1e-3}), resume=2)
    monkeypatch.undo()
    assert sorted(path.name for path in run.glob("step-*")) == ["step-00000002"]
    assert [path.name for path in run.glob("validation*.png")] == ["validation-00000003.png"]
    assert [steps_of(table(run / name)) for name in ("loss.csv", "validation.csv")] == [[1, 2, 3], [3]]
    assert f"removing {run / 'step-00000006'}: the run continues after step 2" in caplog.text
    assert json.loads((run / "run.json").read_text())["history"][0]["after_step"] == 2
    distill(config, resume="latest")
    assert_same_weights(run, run.with_name("as it was"))


def test_two_runs_in_one_folder_are_refused(make_config: MakeConfig) -> None:
    config = make_config()
    with (
        folder_lock(config.run.folder),
        pytest.raises(
            ValueError,
            match=rf"another process is using .*run \(process {os.getpid()} on .*\): wait for it, stop it, or choose",
        ),
    ):
        distill(config)
    assert not config.run.folder.exists()


def test_checkpoint_without_its_adapter_is_complete(make_config: MakeConfig) -> None:
    """Users may move an adapter away to publish it."""
    distill(make_config(run={"steps": 4}))
    run = make_config().run.folder
    shutil.move(run / "step-00000004" / "adapter", run.parent / "mine")
    from_pretrained(run.parent / "mine")
    assert latest_checkpoint(run) == (run / "step-00000004", 4)


def test_resume_reports_and_rewrites_an_incomplete_checkpoint(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(run={"steps": 4})
    distill(config)
    run = config.run.folder
    (run / "step-00000004" / "checkpoint.json").write_text('{"files": {"trai')
    shutil.copytree(run / "step-00000002", run / "step-00000002.kept")
    distill(config, resume="latest")
    assert f"removing {run / 'step-00000004'}: it is incomplete" in caplog.text
    assert latest_checkpoint(run) == (run / "step-00000004", 4)
    assert (run / "step-00000002.kept").is_dir()


@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.safetensors"])
def test_resume_refuses_a_damaged_checkpoint(name: str, make_config: MakeConfig) -> None:
    config = make_config(run={"steps": 2})
    distill(config)
    file = config.run.folder / "step-00000002" / name
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(ValueError, match=r"step-00000002 is damaged .*: remove it to continue after"):
        distill(make_config(run={"steps": 3}), resume="latest")


def test_checkpoint_with_other_tensor_names_is_refused(make_config: MakeConfig) -> None:
    """Another version may name them differently."""
    config = make_config(run={"steps": 2})
    distill(config)
    folder = config.run.folder / "step-00000002"
    tensors = load_file(folder / "trained.safetensors")
    save_file({f"old.{name}": tensor for name, tensor in tensors.items()}, folder / "trained.safetensors")
    manifest = json.loads((folder / "checkpoint.json").read_text())
    manifest["files"]["trained.safetensors"] = (folder / "trained.safetensors").stat().st_size
    (folder / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"do not fit this model; {len(tensors)} missing: .* not in this model: old"):
        distill(make_config(run={"steps": 3}), resume="latest")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("other.exp_avg", torch.zeros(2, 3)), ("layer.exp_avg", torch.zeros(2)), ("step", torch.zeros(()))],
)
def test_optimizer_state_that_does_not_fit_is_refused(name: str, tensor: torch.Tensor, tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    save_file({"layer": weight.detach()}, tmp_path / "trained.safetensors")
    right = {"layer.exp_avg": torch.zeros(2, 3), "layer.step": torch.zeros(())}
    save_file(right, tmp_path / "optimizer.safetensors")
    load_checkpoint(tmp_path, {"layer": weight})
    save_file(right | {name: tensor}, tmp_path / "optimizer.safetensors")
    with pytest.raises(ValueError, match=rf"optimizer.safetensors does not fit this model: {name}"):
        load_checkpoint(tmp_path, {"layer": weight})


def test_divergence_right_after_resuming_advises_an_earlier_checkpoint(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(make_config(run={"steps": 4}))
    terms = trainer.loss_terms

    def broken(*arguments: Any) -> dict[str, torch.Tensor]:
        return {name: term * float("nan") for name, term in terms(*arguments).items()}

    monkeypatch.setattr(trainer, "loss_terms", broken)
    with pytest.raises(
        DivergedError,
        match=r"is the first step after .*step-00000004: try --resume latest with a lower rate.* with --resume 2",
    ):
        distill(make_config(run={"steps": 6}), resume="latest")


@pytest.mark.parametrize("resume", [None, "latest"])
def test_call_killed_before_writing_its_record_can_be_repeated(resume: Resume | None, make_config: MakeConfig) -> None:
    config = make_config()
    config.run.folder.mkdir()
    (config.run.folder / ".run.json.77.tmp").write_text("{")
    check_run(config, "samples", resume=resume)


def test_distill_refuses_a_folder_of_other_files(make_config: MakeConfig) -> None:
    config = make_config()
    run = config.run.folder
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; add --resume latest to continue its run"):
        distill(config)
    with pytest.raises(ValueError, match=r"holds no run \(no run.json\) to continue: name another folder"):
        distill(config, resume="latest")
    assert [path.name for path in run.iterdir()] == ["notes.txt"]
