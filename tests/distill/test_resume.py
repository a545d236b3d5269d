"""Going on with a run: after kill -9, after a NaN, with other settings, from checkpoints that are not as they were."""

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
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from tiny_distill import launch_run, loss_rows, trained_weights, write_config

from lineardit import from_pretrained
from lineardit.distill import checkpoint
from lineardit.distill.checkpoint import latest_checkpoint
from lineardit.distill.config import DistillConfig
from lineardit.distill.data import TeacherSamples
from lineardit.distill.diverged import DivergedError
from lineardit.distill.runs import check_run, record_run
from lineardit.distill.student import build_student_
from lineardit.distill.train import distill, load_base, start_accelerator
from lineardit.distill.trainer import Trainer

MakeConfig = Callable[..., DistillConfig]


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
    file = write_config(config, tmp_path / "config.toml")
    run, csv_file = Path(config.run.directory), Path(config.run.directory) / "loss.csv"
    process = launch_run(file)
    kill_after = random.Random(time.time_ns()).randrange(4, 50)
    while process.poll() is None and not (csv_file.is_file() and len(csv_file.read_text().splitlines()) > kill_after):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "adapter").exists(), f"finished before it could be killed after step {kill_after}"
    distill(config, resume=True)
    whole = make_config(trained=trained, run=steps | {"directory": str(tmp_path / "whole")}, save={"every": 1000})
    distill(whole)
    assert [row["step"] for row in loss_rows(run)] == list(range(1, 61))
    expected = trained_weights(tmp_path / "whole")
    assert trained_weights(run).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_weights(run).items())


@pytest.mark.slow
def test_two_processes_killed_and_resumed_end_in_the_same_weights(make_config: MakeConfig, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"layerwise": {"steps": 2, "lr": 1e-2}, "save": {"every": 3}}
    steps = {"steps": 40, "batch_size": 2}
    config, whole = (
        make_config(**settings, run=steps | {"directory": str(tmp_path / name)}) for name in ("killed", "whole")
    )
    file, csv_file = write_config(config, tmp_path / "killed.toml"), Path(config.run.directory) / "loss.csv"
    process = launch_run(file, processes=2)
    kill_after = random.Random(time.time_ns()).randrange(4, 30)
    while process.poll() is None and not (csv_file.is_file() and len(csv_file.read_text().splitlines()) > kill_after):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)  # the launcher and what it has launched
    process.wait()
    assert not Path(config.run.directory, "adapter").exists(), f"finished before it could be killed after {kill_after}"
    for one in (
        launch_run(file, "--resume", "latest", processes=2),
        launch_run(write_config(whole, tmp_path / "whole.toml"), processes=2),
    ):
        assert one.wait() == 0, one.stderr.read().decode()
    assert [row["step"] for row in loss_rows(tmp_path / "killed")] == list(range(1, 43))
    expected = trained_weights(tmp_path / "whole")
    resumed = trained_weights(tmp_path / "killed")
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.items())


def test_a_run_goes_on_that_was_started_before_a_setting_came(make_config: MakeConfig) -> None:
    config = make_config(run={"steps": 2})
    distill(config)
    record = config.run.folder / "run.json"
    settings = json.loads(record.read_text())
    del settings["run"]["min_tokens"], settings["layerwise"]
    record.write_text(json.dumps(settings))
    check_run(config, settings["samples"], resume=True)
    with pytest.raises(ValueError, match=r"run.min_tokens was 0, now 7"):
        check_run(make_config(run={"steps": 2, "min_tokens": 7}), settings["samples"], resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    terms = Trainer.terms

    def broken(self: Trainer, *arguments: Any) -> dict[str, torch.Tensor]:
        found = terms(self, *arguments)
        return (
            found | {"prediction": found["prediction"] * float("nan")} if len(loss_rows(self.directory)) == 4 else found
        )

    config = make_config()
    monkeypatch.setattr(Trainer, "terms", broken)
    run = Path(config.run.directory)
    told = r"prediction is nan at step 5; go on after the last checkpoint, .*step-00000004, .* --set optimizer.lr=0.003"
    with pytest.raises(DivergedError, match=told):
        distill(config)
    assert [row["step"] for row in loss_rows(run)] == [1, 2, 3, 4]
    assert all(tensor.isfinite().all() for tensor in load_file(run / "step-00000004" / "trained.safetensors").values())
    assert not (run / "adapter").exists()
    monkeypatch.undo()
    from_pretrained(run / "step-00000004" / "adapter")
    lower = make_config(optimizer={"lr": 3e-3, "betas": [0.8, 0.9]}, run={"steps": 5})
    distill(lower, resume=True)
    assert [row["step"] for row in loss_rows(run)] == [1, 2, 3, 4, 5]
    assert loss_rows(run)[4]["lr"] < 3e-3 < loss_rows(run)[1]["lr"]
    state = torch.load(run / "step-00000005" / "optimizer.bin")
    assert list(state["param_groups"][0]["betas"]) == [0.8, 0.9]


def test_resume_passes_over_incomplete_checkpoints(make_config: MakeConfig) -> None:
    config = make_config(schedule={"kind": "constant", "warmup": 0}, save={"every": 2, "keep_last": 3})
    distill(config)
    run = Path(config.run.directory)
    (run / "step-00000006" / "optimizer.bin").write_bytes(b"short")
    (run / ".step-00000007.tmp").mkdir()
    assert latest_checkpoint(run) == (run / "step-00000004", 4)
    shutil.rmtree(run / "step-00000006")
    longer = make_config(schedule={"kind": "constant", "warmup": 0}, run={"steps": 8})
    distill(longer, resume=True)
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
    record_run(make_config(), "samples")
    with pytest.raises(ValueError, match=f"was started with other settings: .*({message})"):
        check_run(make_config(**change), "samples", resume=True)
    check_run(make_config(run={"gradient_accumulation": 2}, save={"every": 9}), "samples", resume=True)
    with pytest.raises(ValueError, match="samples was 'samples', now 'others'"):
        check_run(make_config(), "others", resume=True)


def test_resume_tells_and_keeps_what_counts_from_there_on(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    record_run(make_config(), "samples")
    record_run(make_config(), "samples")  # nothing changed, nothing told
    config = make_config(optimizer={"lr": 1e-3})
    check_run(config, "samples", resume=True)
    record_run(config, "samples")
    told = "optimizer.lr was 0.01, now 0.001"
    assert [record.getMessage() for record in caplog.records] == [
        f"{config.run.directory} goes on after step 0 with other settings: {told}"
    ]
    record = json.loads((Path(config.run.directory) / "run.json").read_text())
    assert record["history"] == [{"after_step": 0, "changed": [told]}]
    check_run(config, "samples", resume=True)


def test_resume_refuses_fewer_steps_than_there_are(make_config: MakeConfig) -> None:
    distill(make_config(run={"steps": 4}))
    with pytest.raises(ValueError, match=r"run.steps must be >= 4, for which .*step-00000004 is the newest checkpoint"):
        distill(make_config(run={"steps": 3}), resume=True)


def test_a_rank_leaves_files_alone_that_another_is_writing(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank writes under a passing name, as safetensors does, until all ranks wait."""
    wait, synced = Accelerator.wait_for_everyone, []

    def save_state(accelerator: Accelerator, directory: str) -> None:
        Path(directory, ".tmpAbCdEf").write_bytes(b"weights")

    def wait_for_everyone(accelerator: Accelerator) -> None:
        for path in Path(config.run.directory).glob(".step-*/.tmpAbCdEf"):
            path.rename(path.with_name("trained.safetensors"))
        wait(accelerator)

    config = make_config(run={"steps": 1})
    monkeypatch.setattr(Accelerator, "save_state", save_state)
    monkeypatch.setattr(Accelerator, "wait_for_everyone", wait_for_everyone)
    monkeypatch.setattr(checkpoint, "sync", lambda path: synced.append(path.name))
    distill(config)
    assert "trained.safetensors" in synced
    assert ".tmpAbCdEf" not in synced


def test_a_checkpoint_without_its_adapter_is_whole(make_config: MakeConfig) -> None:
    """People publish adapters."""
    distill(make_config(run={"steps": 4}))
    run = Path(make_config().run.directory)
    shutil.move(run / "step-00000004" / "adapter", run.parent / "mine")
    from_pretrained(run.parent / "mine")
    assert latest_checkpoint(run) == (run / "step-00000004", 4)


def test_resume_tells_what_it_passes_over_and_writes_it_anew(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(run={"steps": 4})
    distill(config)
    run = Path(config.run.directory)
    (run / "step-00000004" / "checkpoint.json").write_text('{"files": {"trai')
    shutil.copytree(run / "step-00000002", run / "step-00000002.kept")
    distill(config, resume=True)
    assert f"{run / 'step-00000004'} is not whole, and is passed over" in caplog.text
    assert latest_checkpoint(run) == (run / "step-00000004", 4)
    assert (run / "step-00000002.kept").is_dir()


@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.bin"])
def test_a_damaged_checkpoint_is_told(name: str, make_config: MakeConfig) -> None:
    config = make_config(run={"steps": 2})
    distill(config)
    file = Path(config.run.directory) / "step-00000002" / name
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(ValueError, match=r"step-00000002 is damaged .*: remove it, and the run goes on after"):
        distill(make_config(run={"steps": 3}), resume=True)


def test_a_checkpoint_with_other_tensors_is_refused(make_config: MakeConfig) -> None:
    """As another version may name them."""
    config = make_config(run={"steps": 2})
    distill(config)
    folder = Path(config.run.directory) / "step-00000002"
    tensors = load_file(folder / "trained.safetensors")
    save_file({f"old.{name}": one for name, one in tensors.items()}, folder / "trained.safetensors")
    manifest = json.loads((folder / "checkpoint.json").read_text())
    manifest["files"]["trained.safetensors"] = (folder / "trained.safetensors").stat().st_size
    (folder / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"do not fit this model; {len(tensors)} missing: .* not in this model: old"):
        distill(make_config(run={"steps": 3}), resume=True)


def test_a_run_that_diverges_at_once_is_told_that_its_checkpoint_is_bad(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(make_config(run={"steps": 2}))
    terms = Trainer.terms

    def broken(self: Trainer, *arguments: Any) -> dict[str, torch.Tensor]:
        return {name: term * float("nan") for name, term in terms(self, *arguments).items()}

    monkeypatch.setattr(Trainer, "terms", broken)
    with pytest.raises(
        DivergedError,
        match=r"is the first after .*step-00000002: with --resume latest try a lower rate.* remove that folder",
    ):
        distill(make_config(run={"steps": 4}), resume=True)


def test_checkpoints_of_different_steps_are_refused(
    make_config: MakeConfig, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(run={"steps": 2})
    distill(config)
    pipe = load_base(config.base)
    build_student_(pipe, config)
    trainer = Trainer(start_accelerator(), config, pipe, TeacherSamples(data), mixed=False)
    monkeypatch.setattr(trainer.accelerator, "gather", lambda mine: torch.cat([mine, mine - 1]))  # of another machine
    with pytest.raises(ValueError, match=r"checkpoints of different steps, \[2, 1\]: put run.directory on a disk"):
        trainer.restore()
    shutil.rmtree(config.run.directory)  # on this machine there is none
    monkeypatch.setattr(trainer.accelerator, "gather", lambda mine: torch.cat([mine + 2, mine]))
    with pytest.raises(ValueError, match=r"checkpoints of different steps, \[2, 0\]: put run.directory on a disk"):
        trainer.restore()


def test_distill_refuses_a_folder_in_use(make_config: MakeConfig) -> None:
    config = make_config()
    run = Path(config.run.directory)
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; add --resume latest to go on with its run"):
        distill(config)
    with pytest.raises(ValueError, match=r"holds no run \(no run.json\) to go on with: name another folder"):
        distill(config, resume=True)
    assert [path.name for path in run.iterdir()] == ["notes.txt"]
