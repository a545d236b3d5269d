"""The layerwise phase: each layer's own gradient on the teacher's activations, and runs resumed in it."""

import csv
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor, nn

from lineardit.distill.config import DistillConfig
from lineardit.distill.data import TeacherSamples
from lineardit.distill.diverged import DivergedError
from lineardit.distill.latent_functions import latent_functions
from lineardit.distill.layerwise import layer_error, layerwise_training
from lineardit.distill.schedule import learning_rate
from lineardit.distill.student import build_student_, teacher, trained_parameters
from lineardit.distill.train import distill
from lineardit.distill.trainer import Trainer
from lineardit.linearize.convert import swapped

MakeConfig = Callable[..., DistillConfig]
KINDS = {"lora": {"kind": "lora", "rank": 2}, "attention": {"kind": "attention"}}
TRAINED = pytest.mark.parametrize("trained", KINDS.values(), ids=KINDS)
MALA = {"method": "mala", "conv_size": 3, "balance": True}


def _rows(run: Path) -> list[dict[str, float]]:
    with (run / "loss.csv").open(newline="") as file:
        return [
            {name: float(value) for name, value in row.items() if value and name != "seconds"}
            for row in csv.DictReader(file)
        ]


def _student(pipe: Any, config: DistillConfig, data: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A student in which every trained parameter has an effect, and arguments for its forward."""
    build_student_(pipe, config)
    model = pipe.transformer
    torch.manual_seed(0)
    for parameter in trained_parameters(model).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    batch = TeacherSamples(data).load([0, 2])
    sigma = torch.tensor([0.3, 0.8])
    return model, latent_functions(model).inputs(
        model, batch.latents, sigma, batch.conditions, grid=batch.grid, guidance=3.5
    )


def _alone(model: nn.Module, inputs: dict[str, Any]) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Error and gradients of each swapped module, called by itself on its inputs in the teacher's forward."""
    seen: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(
            lambda _module, args, kwargs, output, name=name: seen.update({name: (args, kwargs, output)}),
            with_kwargs=True,
        )
        for name, module in swapped(model).items()
    ]
    with teacher(model):
        model(**inputs)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        model(**inputs)  # publishes the grid
    results = {}
    for name, (args, kwargs, output) in seen.items():
        error = layer_error(model.get_submodule(name)(*args, **kwargs), output)
        error.backward()
        gradients = {name: weight.grad for name, weight in trained_parameters(model).items() if weight.grad is not None}
        results[name] = error.detach(), gradients
        model.zero_grad()
    return results


@TRAINED
def test_layerwise_training_gives_each_layer_the_gradient_of_its_own_error(
    trained: dict[str, Any], pipe: Any, data: Path, make_config: MakeConfig
) -> None:
    model, inputs = _student(pipe, make_config(method=MALA, trained=trained), data)
    alone = _alone(model, inputs)
    with torch.no_grad(), layerwise_training(model, nullcontext, loss_scale=0.5) as errors:
        model(**inputs)
    assert errors == {name: error for name, (error, _) in alone.items()}
    expected = [(name, gradient) for _, gradients in alone.values() for name, gradient in gradients.items()]
    assert len(dict(expected)) == len(expected), "no parameter learns from two layers"
    actual = {name: parameter.grad for name, parameter in trained_parameters(model).items()}
    assert actual.keys() == dict(expected).keys()
    for name, gradient in expected:
        torch.testing.assert_close(actual[name], 0.5 * gradient, rtol=1e-6, atol=0)
        assert gradient.abs().max() > 0


@TRAINED
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layerwise_training_returns_the_teachers_output_bit_for_bit(
    dtype: str, trained: dict[str, Any], pipe: Any, data: Path, make_config: MakeConfig
) -> None:
    pipe.transformer.to(getattr(torch, dtype))
    mixed = {"mixed_precision": "bf16"} if dtype == "bfloat16" else {}
    model, inputs = _student(pipe, make_config(trained=trained, base={"dtype": dtype}, run=mixed), data)
    inputs = {
        name: one.to(getattr(torch, dtype))
        if isinstance(one, Tensor) and name in ("hidden_states", "encoder_hidden_states", "pooled_projections")
        else one
        for name, one in inputs.items()
    }
    with teacher(model):
        expected = model(**inputs)[0]

    def precision() -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")

    with torch.no_grad(), layerwise_training(model, precision) as errors:
        assert torch.equal(model(**inputs)[0], expected)
    assert all(0 < error < 10 for error in errors.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in swapped(model).values())
    with torch.no_grad(), precision():
        assert not torch.equal(model(**inputs)[0], expected)


def test_layer_error_is_relative_for_each_sample() -> None:
    image, text = torch.tensor([[[2.0, 0.0]], [[0.0, 4.0]]]), torch.zeros(2, 1, 1)
    assert layer_error((image, text), (image, text)) == 0
    assert layer_error((0 * image, text), (image, text)) == 1
    # squared errors: 1 + 4 relative to 4 in the first sample, 4 relative to 16 in the second
    off = image + torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]]), text + torch.tensor([[[2.0]], [[0.0]]])
    assert layer_error(off, (image, text)).item() == pytest.approx((5 / 4 + 4 / 16) / 2)
    assert layer_error(image[:1].bfloat16() / 3, image[:1]).dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "stopped_after"),
    [
        pytest.param("lora", 2, id="in-the-first"),
        pytest.param("attention", 3, id="between"),
        pytest.param("lora", 5, id="in-the-second"),
        pytest.param("attention", 2, id="attention-in-the-first", marks=pytest.mark.slow),
    ],
)
def test_run_resumes_in_either_phase_bit_for_bit(
    kind: str,
    stopped_after: int,
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"method": MALA, "trained": KINDS[kind], "layerwise": {"steps": 3, "lr": 1e-2}, "save": {"every": 1}}
    uninterrupted = make_config(**settings, run={"directory": str(tmp_path / "whole"), "steps": 4})
    expected = load_file(distill(uninterrupted) / "lineardit.safetensors")
    config = make_config(**settings, run={"steps": 4})
    step = Trainer.step

    def broken(self: Trainer, number: int) -> dict[str, float]:
        if number > stopped_after:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", broken)
    with pytest.raises(KeyboardInterrupt):
        distill(config)
    monkeypatch.undo()
    resumed = load_file(distill(config, resume="latest") / "lineardit.safetensors")
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.items())
    assert _rows(Path(config.run.directory)) == _rows(tmp_path / "whole")


def test_each_phase_has_its_losses_rate_and_part_of_the_curve(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), savefig(self, *args, **kw)))
    config = make_config(method=MALA, layerwise={"steps": 30, "lr": 2e-2, "warmup": 2}, run={"steps": 2})
    distill(config)
    rows = _rows(Path(config.run.directory))
    assert [set(row) for row in rows[:30]] == [{"step", "layerwise", "loss", "lr"}] * 30
    assert [set(row) for row in rows[30:]] == [{"step", "flow", "prediction", "attention", "loss", "lr"}] * 2
    assert all(row["loss"] == row["layerwise"] for row in rows[:30])
    assert rows[29]["layerwise"] < 0.5 * rows[0]["layerwise"]
    assert [row["lr"] for row in rows] == [learning_rate(config, step) for step in range(32)]
    assert [rows[0]["lr"], rows[1]["lr"], rows[30]["lr"], rows[31]["lr"]] == [1e-2, 2e-2, 5e-3, 1e-2]
    boundary = [line for line in figures[-1].axes[0].lines if line.get_linestyle() == "--"]
    assert [list(line.get_xdata()) for line in boundary] == [[30.5, 30.5]]


def test_layerwise_phase_lowers_the_initial_attention_loss(make_config: MakeConfig, tmp_path: Path) -> None:
    terms = {}
    for steps in (0, 30):
        directory = tmp_path / str(steps)
        first = {"steps": steps, "lr": 2e-2, "warmup": 2}
        distill(make_config(method=MALA, layerwise=first, run={"directory": str(directory), "steps": 1}))
        terms[steps] = _rows(directory)[-1]
    assert terms[30]["attention"] < 0.7 * terms[0]["attention"]


def test_layerwise_phase_of_zero_steps_changes_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    runs = []
    for name, tables in (("left out", {}), ("zero", {"layerwise": {"steps": 0, "lr": 5.0}})):
        adapter = distill(make_config(run={"directory": str(tmp_path / name), "steps": 3}, **tables))
        runs.append((_rows(tmp_path / name), load_file(adapter / "lineardit.safetensors")))
    assert list(runs[0][0][0]) == ["step", "flow", "prediction", "attention", "loss", "lr"]
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(one, runs[1][1][name]) for name, one in runs[0][1].items())


def test_checkpointing_and_accumulation_change_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    runs = []
    for name, changes in (("plain", {}), ("other", {"gradient_checkpointing": True, "gradient_accumulation": 2})):
        distill(make_config(layerwise={"steps": 2}, run={"directory": str(tmp_path / name), "steps": 1} | changes))
        runs.append(_rows(tmp_path / name))
    for one, two in zip(*runs, strict=True):
        assert one == pytest.approx(two, rel=1e-5)


def test_non_finite_layer_error_stops_the_run(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(method=MALA, layerwise={"steps": 5, "lr": 1e30, "warmup": 0}, save={"every": 1})
    with pytest.raises(DivergedError, match=r"is (inf|nan) at step \d; .* a lower rate, such as --set layerwise.lr="):
        distill(config)
    assert capsys.readouterr().err.endswith("\n")  # the error goes on a line below the progress bar
