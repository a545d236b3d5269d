"""A run that starts from another run's adapter: the same weights, its method, and refused settings."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file
from tiny_distill import build_tiny, loss_rows, write_config

from lineardit import Clear, linearize_, save_adapter
from lineardit.distill.config import Attention, DistillConfig, Lora, Start
from lineardit.distill.config_tables import load_config
from lineardit.distill.student import build_student_, trained_parameters
from lineardit.distill.train import distill, load_teacher
from lineardit.linearize.adapters.conversion import repack_adapter

MakeConfig = Callable[..., DistillConfig]
POOLED = {"method": "clear", "radius": 2, "pool_size": 2}
PATTERNS = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")


def _adapter(make_config: MakeConfig, folder: Path, **tables: Any) -> Path:
    """The adapter of a run of two steps."""
    trained = {"kind": "lora", "rank": 2, "alpha": 3.0}
    usual: dict[str, Any] = {"method": POOLED, "trained": trained, "run": {"steps": 2, "directory": str(folder)}}
    return distill(make_config(**usual | tables))


def _without(config: DistillConfig, file: Path, *tables: str) -> Path:
    """The settings as a file without some tables."""
    lines = write_config(config, file).read_text().splitlines()
    file.write_text("\n".join(line for line in lines if line.partition(".")[0] not in tables))
    return file


@pytest.mark.parametrize(
    "trained", [{"kind": "lora", "rank": 2, "alpha": 3.0}, {"kind": "attention"}], ids=lambda trained: trained["kind"]
)
@pytest.mark.parametrize("as_file", [False, True], ids=["folder", "file"])
def test_student_starts_with_the_adapters_weights(
    as_file: bool, trained: dict[str, Any], make_config: MakeConfig, tmp_path: Path
) -> None:
    adapter = _adapter(make_config, tmp_path / "first", trained=trained)
    first = load_file(tmp_path / "first" / "step-00000002" / "trained.safetensors")
    if as_file:
        adapter = repack_adapter(adapter, output=tmp_path / "student.safetensors")
    file = _without(make_config(), tmp_path / "config.toml", "method", "trained")
    config = load_config(file, [f"start.adapter={adapter}"])
    assert set(config.method.values()) == {Clear(radius=2, pool_size=2)}
    assert config.trained == (Attention() if trained["kind"] == "attention" else Lora(rank=2, alpha=3.0))
    pipe = load_teacher(config.base)
    build_student_(pipe, config)
    initial = trained_parameters(pipe.transformer)
    assert initial.keys() == first.keys()
    assert all(torch.equal(initial[name], tensor) for name, tensor in first.items())
    assert all(tensor.dtype == torch.float32 for tensor in initial.values())


def test_run_starts_from_the_adapter_of_another_run(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On resume the adapter may have moved, but its content must be the same."""
    adapter = _adapter(make_config, tmp_path / "first")
    file = _without(make_config(run={"steps": 2}), tmp_path / "config.toml", "method", "trained")
    config = load_config(file, [f"start.adapter={adapter}"])
    with caplog.at_level(logging.INFO):
        distill(config)
    run = config.run.folder
    assert f"loaded from {adapter}: 16 of 16 trained tensors" in caplog.text
    assert f", starting from {adapter}" in caplog.text
    assert loss_rows(run)[0]["attention"] < loss_rows(tmp_path / "first")[0]["attention"]

    shutil.move(adapter, tmp_path / "moved")
    longer = ["run.steps=3"]
    distill(load_config(file, [f"start.adapter={tmp_path / 'moved'}", *longer]), resume="latest")
    other = _adapter(make_config, tmp_path / "other", optimizer={"lr": 1e-4})
    with pytest.raises(ValueError, match=r"was started with other settings: start_adapter was '\w{16}', now '\w{16}'"):
        distill(load_config(file, [f"start.adapter={other}", *longer]), resume="latest")
    with pytest.raises(ValueError, match=r"start_adapter was '\w{16}', now None"):
        distill(replace(config, start=Start()), resume="latest")


def test_run_starts_from_an_untrained_conversion(make_config: MakeConfig, tmp_path: Path) -> None:
    """Its LoRA starts untrained."""
    pipe = build_tiny()
    linearize_(pipe, Clear(radius=2, pool_size=2))
    save_adapter(pipe, tmp_path / "converted")
    file = _without(make_config(), tmp_path / "config.toml", "method")
    config = load_config(file, [f"start.adapter={tmp_path / 'converted'}", "trained.rank=4"])
    assert config.trained == Lora(rank=4)
    build_student_(pipe := load_teacher(config.base), config)
    up_weights = [weight for name, weight in trained_parameters(pipe.transformer).items() if name.endswith(".up")]
    assert len(up_weights) == 7
    assert not any(weight.any() for weight in up_weights)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with LoRA of rank 2 on to_q and to_k."""
    from lineardit.linearize.weights.training import add_lora_

    pipe = FluxPipeline.from_pretrained(base)
    linearize_(pipe, Clear(radius=2))
    add_lora_(pipe, rank=2, targets=["to_q", "to_k"])
    return save_adapter(pipe, tmp_path_factory.mktemp("adapters") / "adapter")


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"method": {"method": "clear", "radius": 3}}, r"has Clear\(radius=2.*\) in transformer_blocks.0.attn, but the "
         r"settings have Clear\(radius=3.*\): leave \[method\]"),
        ({"method": {PATTERNS[0]: {"method": "clear", "radius": 2}}}, r"in single_transformer_blocks.0.attn, but the "
         "settings have full attention: leave"),
        ({"trained": {"kind": "lora", "rank": 4}}, r"trained.rank must be 2 as in start.adapter .*, got 4; leave it"),
        ({"trained": {"kind": "lora", "rank": 2, "alpha": 1.0}}, r"trained.alpha must be 2(.0)? as in .*, got 1.0"),
        ({"trained": {"kind": "attention"}}, r"trained.kind must be 'lora' as in start.adapter .*, got 'attention'"),
        ({"trained": {"kind": "lora", "rank": 2, "projections": ["to_q"]}},
         r"has trained layers that trained.projections leaves out: .*to_k.*; leave trained.projections out"),
    ],
    ids=["method", "layers", "rank", "alpha", "kind", "projections"],
)  # fmt: skip
def test_start_adapter_that_contradicts_the_settings_is_refused(
    tables: dict[str, Any], message: str, adapter: Path, make_config: MakeConfig
) -> None:
    config = make_config(**tables, start={"adapter": str(adapter)})
    with pytest.raises(ValueError, match=message):
        build_student_(load_teacher(config.base), config)


def test_layers_missing_from_the_start_adapter_begin_untrained(adapter: Path, make_config: MakeConfig) -> None:
    config = make_config(start={"adapter": str(adapter)})
    build_student_(pipe := load_teacher(config.base), config)
    stored, parameters = load_file(adapter / "lineardit.safetensors"), trained_parameters(pipe.transformer)
    layer = "transformer_blocks.0.attn"
    assert torch.equal(parameters[f"{layer}.to_k.lineardit_lora.down"], stored[f"{layer}.to_k.lora_A.weight"])
    assert parameters[f"{layer}.to_v.lineardit_lora.down"].any()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("start.adapter=nowhere", "nowhere is neither a local folder nor a Hub id"),
        ("start.revision=main", "start.revision must be left out without start.adapter, got 'main'"),
        ("start.adaptor=x", r"unknown setting start.adaptor; did you mean start.adapter\?"),
        ("start=3", "an override must look like table.key=value"),
    ],
)
def test_bad_start_settings_are_refused(override: str, message: str, make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(_without(make_config(), tmp_path / "config.toml", "method"), [override])
