"""Whole runs of a few steps: their files, two processes against one, and refused input."""

import csv
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny_distill import PROMPTS, assert_same_weights, fork_run, launch_run, loss_rows, table, write_config

from lineardit import Clear, Hybrid, ProxyTokens, dense, from_pretrained
from lineardit.distill import figures
from lineardit.distill.__main__ import main
from lineardit.distill.config import DistillConfig
from lineardit.distill.data import TeacherSamples
from lineardit.distill.diverged import DivergedError
from lineardit.distill.latent_functions import latent_functions
from lineardit.distill.prepare import prepare
from lineardit.distill.processes import start_accelerator
from lineardit.distill.schedule import learning_rate, noise_levels
from lineardit.distill.student import build_student_
from lineardit.distill.train import distill, load_teacher
from lineardit.linearize.methods import config_to_dict

MakeConfig = Callable[..., DistillConfig]
POOLED = {"method": "clear", "radius": 2, "pool_size": 2}


def test_two_processes_give_the_same_losses_and_validation(make_config: MakeConfig, tmp_path: Path) -> None:
    """Ten steps in both phases at the same global batch; the single process accumulates two parts per step.

    Each process draws some of the validation pictures, which use the averaged weights.
    """
    run = {"steps": 7, "batch_size": 4}
    tables: dict[str, Any] = {"layerwise": {"steps": 3, "lr": 1e-2}, "validate": {"samples": 3}}
    tables["trained"] = {"kind": "lora", "rank": 2, "ema": 0.9}
    alone = make_config(**tables, run=run | {"directory": str(tmp_path / "one"), "gradient_accumulation": 2})
    together = make_config(**tables, run=run | {"directory": str(tmp_path / "two")})
    process = launch_run(write_config(together, tmp_path / "two.toml"), processes=2)
    distill(alone)
    assert process.wait() == 0, process.stderr.read().decode()
    for row, other in zip(loss_rows(tmp_path / "one"), loss_rows(tmp_path / "two"), strict=True):
        assert {name: other[name] for name in row if name != "seconds"} == pytest.approx(
            {name: value for name, value in row.items() if name != "seconds"}, rel=1e-5
        )
    (one,), (two,) = (table(tmp_path / name / "validation.csv") for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-5)
    sheets = [Image.open(tmp_path / name / "validation-00000010.png").tobytes() for name in ("one", "two")]
    assert sheets[0] == sheets[1]


def test_distill_leaves_figures_and_the_last_checkpoints(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(method=POOLED, validate={"samples": 3, "every": 4})
    with caplog.at_level("INFO"):
        distill(config)
    assert caplog.text.count("self-attention modules") == 1
    run = config.run.folder
    names = {path.name for path in run.iterdir()}
    assert names == {
        "adapter", "loss.csv", "loss.png", "run.json", "step-00000004", "step-00000006",
        "validation-00000004.png", "validation-00000006.png", "validation.csv",
    }  # fmt: skip
    rows = loss_rows(run)
    assert list(rows[0]) == ["step", "flow", "prediction", "attention", "loss", "lr", "seconds"]
    assert rows[0]["loss"] == pytest.approx(rows[0]["flow"] + 0.5 * rows[0]["prediction"] + 0.5 * rows[0]["attention"])
    assert rows[-1]["attention"] < rows[0]["attention"]
    # two factors of each of seven projections, two pooling weights; nothing frozen
    assert len(load_file(run / "step-00000006" / "trained.safetensors")) == 2 * 7 + 2


@pytest.mark.parametrize("trained", [{"kind": "lora", "rank": 2}, {"kind": "attention"}], ids=["lora", "attention"])
def test_distill_leaves_an_adapter_of_the_student(trained: dict[str, Any], make_config: MakeConfig, data: Path) -> None:
    config = make_config(method=POOLED, trained=trained, run={"steps": 2})
    adapter = distill(config)
    stored = load_file(config.run.folder / "step-00000002" / "trained.safetensors")
    student = load_teacher(config.base)
    build_student_(student, config)
    student.transformer.load_state_dict(stored, strict=False)
    batch = TeacherSamples(data).load([0, 2])
    inputs = latent_functions(student.transformer).inputs(
        student.transformer, batch.latents, torch.tensor([0.3, 0.8]), batch.conditions, grid=batch.grid, guidance=3.5
    )
    model = from_pretrained(adapter).transformer
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], student.transformer(**inputs)[0])
        with dense(model):
            assert torch.equal(model(**inputs)[0], load_teacher(config.base).transformer(**inputs)[0])


@pytest.mark.parametrize("terms", [["flow"], ["prediction"], ["attention"]])
def test_loss_term_of_weight_zero_is_not_computed(terms: list[str], make_config: MakeConfig) -> None:
    weights = {name: float(name in terms) for name in ("flow", "prediction", "attention")}
    config = make_config(loss=weights, run={"steps": 1})
    distill(config)
    assert list(loss_rows(config.run.folder)[0]) == ["step", *terms, "loss", "lr", "seconds"]


def test_gradient_checkpointing_changes_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    rows = []
    for on in (False, True):
        directory = tmp_path / str(on)
        distill(make_config(run={"steps": 3, "directory": str(directory), "gradient_checkpointing": on}))
        rows.append([row["loss"] for row in loss_rows(directory)])
    assert rows[0] == pytest.approx(rows[1], rel=1e-6)


def test_mixed_precision_trains_a_bfloat16_base(make_config: MakeConfig, tmp_path: Path) -> None:
    full = make_config(run={"directory": str(tmp_path / "full"), "steps": 2})
    half = make_config(base={"dtype": "bfloat16"}, run={"steps": 2, "mixed_precision": "bf16"})
    distill(full)
    distill(half)
    pairs = zip(loss_rows(tmp_path / "full"), loss_rows(half.run.folder), strict=True)
    assert all(one["flow"] == pytest.approx(two["flow"], rel=0.05) for one, two in pairs)


def test_non_finite_gradient_stops_the_run(make_config: MakeConfig) -> None:
    with pytest.raises(DivergedError, match=r"gradient is (inf|nan) at step 1; there is no checkpoint yet"):
        distill(make_config(loss={"flow": 1e38}))


def test_samples_of_another_teacher_give_a_warning_or_an_error(
    make_config: MakeConfig, data: Path, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    distill(make_config(base={"dtype": "bfloat16"}, run={"steps": 1, "mixed_precision": "bf16"}))
    assert "other weights" not in caplog.text  # another dtype is the same teacher
    others = tmp_path / "others"
    shutil.copytree(data, others)
    index = json.loads((others / "index.json").read_text())
    index["settings"]["teacher"] = "0" * 16
    (others / "index.json").write_text(json.dumps(index))
    tables = {"data": {"directory": str(others)}, "run": {"steps": 1, "directory": str(tmp_path / "second")}}
    distill(make_config(**tables))
    assert f"{others} was made by a FluxTransformer2DModel with other weights than base.model's" in caplog.text
    index["settings"]["model"] = "UNet2DConditionModel"
    (others / "index.json").write_text(json.dumps(index))
    tables["run"] = {"directory": str(tmp_path / "third")}
    with pytest.raises(ValueError, match="was made by a UNet2DConditionModel, but "):
        distill(make_config(**tables))


def test_accelerates_environment_variables_change_nothing(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(make_config(run={"steps": 2, "directory": str(tmp_path / "plain")}))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    AcceleratorState._reset_state(True)  # accelerate reads its environment once per process
    assert start_accelerator().state.dynamo_plugin.backend == DynamoBackend.NO
    distill(make_config(run={"steps": 2, "directory": str(tmp_path / "other")}))
    assert_same_weights(tmp_path / "plain", tmp_path / "other")


@pytest.mark.parametrize("sizes", [((16, 16), (32, 24)), pytest.param(((16, 16),), marks=pytest.mark.slow)])
def test_two_processes_train_a_hybrid_whose_window_covers_pictures(
    sizes: tuple[tuple[int, int], ...], make_config: MakeConfig, base: Path, tmp_path: Path
) -> None:
    """The gate gets no gradient from such pictures."""
    samples = tmp_path / "samples"
    prepare(FluxPipeline.from_pretrained(base), PROMPTS, samples, sizes=sizes, steps=1, max_sequence_length=8)
    method = config_to_dict(Hybrid(local=Clear(radius=5), global_=ProxyTokens(num_proxies=4), gate=1.0))
    config = make_config(method=method, data={"directory": str(samples)}, run={"steps": 4, "batch_size": 2})
    process = fork_run(write_config(config, tmp_path / "config.toml"), processes=2)
    assert process.wait() == 0, process.stderr.read().decode()
    assert len(loss_rows(config.run.folder)) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "run.stepps=3"], "unknown setting run.stepps; did you mean run.steps?"),
        (["--set", "run.batch_size=3", "--set", "run.gradient_accumulation=2"], "run.batch_size must be a multiple of"),
        (["--set", "data.directory=nowhere"], "nowhere holds no index.json; make the samples with `lineardit prepare`"),
        (["--set", "validate.samples=12"], "validate.samples must be < 12"),
        (["--set", "base.model=nowhere"], "nowhere is neither a local folder nor a Hub id"),
        (["--set", "method.radius=0"], "radius must be > 0"),
        (["--set", "method.method=clair"], "unknown method 'clair'"),
    ],
)
def test_main_reports_bad_input_in_one_sentence(
    arguments: list[str], message: str, make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    assert main([str(write_config(config, tmp_path / "config.toml")), *arguments]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lineardit.distill: ")
    assert message in last
    assert not config.run.folder.exists()


def test_missing_matplotlib_is_reported_before_training(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda _: None)
    config = make_config()
    assert main([str(write_config(config, tmp_path / "config.toml"))]) == 2
    assert "is drawn with matplotlib, which is not installed: pip install matplotlib" in capsys.readouterr().err
    assert not config.run.folder.exists()


def test_start_accelerator_refuses_a_wrong_process_count_and_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    assert start_accelerator().num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"the launcher started 2 processes, but accelerate joined 1; launch with"):
        start_accelerator()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "True")
    with pytest.raises(ValueError, match=r"the launcher asks for FSDP, but distillation needs the whole model"):
        start_accelerator()


@pytest.mark.parametrize("at", [0.001, 0.5, 0.999])
def test_noise_levels_are_stratified_over_the_batch(at: float, make_config: MakeConfig) -> None:
    config = make_config(noise={"mean": 1.0, "std": 2.0}, run={"batch_size": 4})
    sigma = noise_levels(config, [1, 3], torch.full((2,), at))
    below = torch.special.ndtr((sigma.logit() - 1) / 2)  # share of the distribution below
    assert below.tolist() == pytest.approx([(1 + at) / 4, (3 + at) / 4], abs=1e-5)


@pytest.mark.parametrize(("kind", "last"), [("constant", 0.5), ("cosine", 0.05)])
def test_learning_rate_follows_warmup_and_schedule(kind: str, last: float, make_config: MakeConfig) -> None:
    config = make_config(optimizer={"lr": 0.5}, schedule={"kind": kind, "warmup": 5, "final": 0.1}, run={"steps": 1005})
    rates = [learning_rate(config, step) for step in range(1005)]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(last, abs=1e-4)


def test_validation_with_a_covering_window_gives_the_teachers_pictures(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sheets = []
    monkeypatch.setattr("lineardit.distill.validation.write_sheet", lambda *arguments: sheets.append(arguments))
    config = make_config(
        method={"method": "clear", "radius": 100}, optimizer={"lr": 1e-30}, run={"steps": 1}, validate={"samples": 2}
    )
    distill(config)
    run = config.run.folder
    with (run / "validation.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["latent_mse"]) < 1e-9
    ((columns, rows, path),) = sheets
    assert columns == ["teacher", "student"]
    assert path == run / "validation-00000001.png"
    assert [[picture.size for picture in pair] for pair in rows] == [[(32, 24)] * 2, [(24, 32)] * 2]
    assert all(teacher.tobytes() == student.tobytes() for teacher, student in rows)
