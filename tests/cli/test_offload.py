"""`--offload` of the commands that generate pictures: same results, and what is refused.

The execution device is the CPU: these test hooks and placement, not transfers between devices.
"""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FluxPipeline
from torch import nn

from lineardit.cli import run
from lineardit.distill import by_name
from lineardit.distill import evaluate as evaluating
from lineardit.distill.evaluate import ByName, evaluate
from lineardit.distill.pictures import PictureSettings
from lineardit.linearize.adapters.quantization import Quantization
from lineardit.pipelines import placement
from lineardit.pipelines.placement import OFFLOADS, check_offload, place_
from tiny_stock import STOCK

SMALL = ("--size", "32x24", "--steps", "1", "--max-sequence-length", "8", "--offline")
SETTINGS = PictureSettings(height=24, width=32, steps=1, max_sequence_length=8)


@pytest.fixture
def cpu_for_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    def sequential(pipe: Any, device: torch.device) -> None:
        """Like the pipeline's own, which names the device "cpu:0": to accelerate that is another device."""
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                cpu_offload(part, device, offload_buffers=len(part._parameters) > 0)

    monkeypatch.setattr(FluxPipeline, "enable_sequential_cpu_offload", sequential)
    for module in (placement, by_name):
        monkeypatch.setattr(module, "check_offload", lambda *_: None)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\na blue square\n")
    return file


def lineardit(*arguments: str | Path) -> int:
    return run([str(argument) for argument in arguments])


def same_files(one: Path, other: Path) -> bool:
    names = [path.name for path in sorted(one.iterdir())]
    return names == [path.name for path in sorted(other.iterdir())] and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


@pytest.mark.usefixtures("cpu_for_accelerator")
def test_samples_are_the_same_with_every_offload(base: Path, prompts: Path, tmp_path: Path) -> None:
    command = ("prepare", base, "--prompts", prompts, *SMALL, "--batch-size", "1", "--shard-size", "2", "-o")
    for offload in OFFLOADS:
        assert lineardit(*command, tmp_path / offload, "--offload", offload) == 0
        assert same_files(tmp_path / "none", tmp_path / offload)


@pytest.mark.usefixtures("cpu_for_accelerator")
def test_evaluations_are_the_same_with_every_offload(
    base: Path, adapter: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("evaluate", base, adapter, "--prompts", prompts, *SMALL, "--no-memory", "-o")
    errors = []
    for offload in OFFLOADS:
        assert lineardit(*command, tmp_path / offload, "--offload", offload) == 0
        assert (f"offload {offload}" in capsys.readouterr().out) == (offload != "none")
        report = json.loads((tmp_path / offload / "report.json").read_text())
        errors.append(report["latent_mse"])
        named = None if offload == "none" else offload
        assert report["question"]["teacher_offload"] == report["question"]["student_offload"] == named
    assert errors == [errors[0]] * len(OFFLOADS)
    assert lineardit(*command, tmp_path / "group") == 2
    assert "report with different teacher_offload, student_offload" in capsys.readouterr().err


@pytest.mark.usefixtures("cpu_for_accelerator")
def test_teacher_is_freed_before_the_student_is_loaded(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []

    def open_and_track(opening: Any) -> Any:
        assert not [reference for reference in loaded if reference() is not None]
        pipe = opened(opening)
        loaded.append(weakref.ref(pipe.transformer))
        return pipe

    opened = by_name.open_named
    monkeypatch.setattr(by_name, "open_named", open_and_track)
    gc.disable()  # reference counting alone must free it
    try:
        both = [ByName(name=str(name), offload="model") for name in (adapter, adapter)]
        evaluate(*both, ["a red circle"], tmp_path / "out", settings=SETTINGS, memory=False)
    finally:
        gc.enable()
    assert len(loaded) == 2


def test_memory_is_measured_on_the_execution_device(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = by_name.open_model(ByName(name=str(base)))
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("cuda"))  # offloaded: the weights are on the CPU
    monkeypatch.setattr(evaluating, "picture_peak", lambda *_: 3.0)
    monkeypatch.setattr(evaluating, "picture_peak_in_subprocess", lambda *_: pytest.fail("drawn on the CPU"))
    assert evaluating._peak(pipe, ByName(name=str(base), offload="model"), SETTINGS) == 3.0


@pytest.mark.parametrize(
    ("command", "offload", "message"),
    [
        ("prepare", "some", "offload must be one of none, model, sequential, group, got 'some'"),
        ("evaluate", "group", "offload 'group' needs an accelerator, and the device is the CPU"),
        ("generate", "some", "offload must be one of"),
        ("nearness", "model", "offload 'model' needs an accelerator"),
        ("profile", "some", "offload must be one of"),
    ],
)
def test_impossible_offload_is_refused_before_a_model_is_loaded(
    command: str,
    offload: str,
    message: str,
    base: Path,
    adapter: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    models = [base, adapter] if command in ("evaluate", "nearness") else [base]
    options = ("--prompts", prompts, *SMALL, "--offload", offload, "-o", tmp_path / "out")
    assert lineardit(command, *models, *options) == 2
    assert message in capsys.readouterr().err


def test_sequential_offload_of_4_bit_weights_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    check_offload(cuda, "model", Quantization(quant_backend="bitsandbytes_4bit"))
    check_offload(cuda, "sequential", Quantization(quant_backend="bitsandbytes_8bit"))
    with pytest.raises(
        ValueError, match=r"offload .sequential. cannot move weights that .* 4 bits: use .* model or gro"
    ):
        check_offload(cuda, "sequential", Quantization(quant_backend="bitsandbytes_4bit"))
    pipe = by_name.open_model(ByName(name=str(base)))
    monkeypatch.setattr(placement, "quantized_types", lambda _: "Params4bit")  # as in a base saved in 4 bits
    with pytest.raises(ValueError, match="offload 'sequential' cannot move weights"):
        place_(pipe, cuda, "sequential")


def test_group_offload_unsupported_by_diffusers_is_refused() -> None:
    message = "^diffusers does not support offload 'group' for a HunyuanDiT2DModel.*: use --offload model$"
    with pytest.raises(ValueError, match=message):
        place_(STOCK["hunyuan-dit"].make(), torch.device("cuda"), "group")


@pytest.mark.parametrize(("kind", "streams"), [(None, True), ("Params4bit", True), ("Int8Tensor", False)])
def test_group_offload_uses_no_streams_for_torchao_weights(
    kind: str | None, streams: bool, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = by_name.open_model(ByName(name=str(base)))
    given: dict[str, Any] = {}
    monkeypatch.setattr(type(pipe), "enable_group_offload", lambda _self, **options: given.update(options))
    monkeypatch.setattr(placement, "quantized_types", lambda _: kind)
    place_(pipe, torch.device("cuda"), "group")
    assert given["use_stream"] is streams
