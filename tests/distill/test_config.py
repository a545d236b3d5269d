"""Settings: reading, validation and round trips."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lineardit import Clear
from lineardit.distill.config import Attention, DistillConfig, Lora
from lineardit.distill.config_tables import config_from_tables, config_to_tables, load_config
from lineardit.distill.description import describe_warmup

TEXT = """
base.model = "some/model"
data.directory = "samples"
run = { directory = "run", steps = 10 }
trained = { kind = "attention" }
optimizer.lr = 1

[method."transformer_blocks.*.attn"]
method = "clear"
radius = 8
[method."single_transformer_blocks.*.attn"]
method = "clear"
radius = 4
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(TEXT)
    return path


def test_load_config_reads_utf8_in_any_locale(file: Path) -> None:
    """And skips the byte order mark that some editors write."""
    file.write_text("\ufeff" + TEXT.replace('"samples"', '"b\xe9"'), encoding="utf-8")
    code = "import sys; from lineardit.distill.config_tables import load_config; print(load_config(sys.argv[1]).data)"
    command = [sys.executable, "-c", code, str(file)]
    environment = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=True)
    assert result.stdout == "Data(directory='b\xe9')\n"
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not TOML: 'utf-8' codec can't decode"):
        load_config(file)


def test_load_config_reads_tables_and_overrides(file: Path) -> None:
    config = load_config(file, ["run.steps=20", "run.mixed_precision=bf16", "optimizer.betas=[0.5, 0.9]"])
    assert config.run.steps == 20
    assert config.run.mixed_precision == "bf16"
    assert config.optimizer.betas == (0.5, 0.9)
    assert isinstance(config.optimizer.lr, float)
    assert isinstance(config.trained, Attention)
    assert config.method["single_transformer_blocks.*.attn"] == Clear(radius=4)
    assert (config.loss.flow, config.loss.prediction, config.loss.attention) == (1.0, 0.5, 0.5)


def test_config_round_trips(file: Path, make_config: Callable[..., DistillConfig]) -> None:
    for config in (load_config(file), make_config()):
        assert config_from_tables(config_to_tables(config)) == config


def test_load_config_reads_the_flux_example() -> None:
    file = Path(__file__).parents[2] / "examples" / "distill_flux.toml"
    config = load_config(file)
    assert config.method.local == Clear(radius=16)
    assert config.run.batch_size == 32
    assert config.trained == Lora(rank=64)
    assert load_config(file, ["trained.kind=attention"]).trained == Attention()  # drops the file's rank, a LoRA setting
    with pytest.raises(ValueError, match=r"unknown setting trained\.rank"):
        load_config(file, ["trained.kind=attention", "trained.rank=8"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.stepps=3", "unknown setting run.stepps; did you mean run.steps?"),
        ("optimiser.lr=1.0", "unknown setting optimiser; did you mean optimizer?"),
        ("trained.projections=[]", "trained.projections must be left out, or name at least one layer"),
        ("run.seed=-1", "run.seed must be in "),
        ("run.zzz=3", "unknown setting run.zzz; known: directory, steps"),
        ("run.steps=many", "run.steps must be of type int, got 'many'"),
        ("run.steps=0", "run.steps must be >= 1, got 0"),
        ("run.steps", "an override must look like table.key=value, got 'run.steps'"),
        ("trained.kind=all", "trained.kind must be lora or attention, got 'all'"),
        ("trained.kind=[]", "trained.kind must be lora or attention, got []"),
        ("trained.rank=4", "unknown setting trained.rank"),
        ("loss.flow=-1", "loss.flow must be >= 0 and finite, got -1.0"),
        ("optimizer.betas=[0.9]", "optimizer.betas must be a list of float pairs"),
        ("base.dtype=bfloat16", "run.mixed_precision must be bf16 or auto"),
        ("layerwise.steps=-1", "layerwise.steps must be >= 0, got -1"),
        ("layerwise.lr=0", "layerwise.lr must be > 0 and finite, got 0"),
        ("layerwise.warmup=-1", "layerwise.warmup must be >= 0, got -1"),
        ("layerwise.stepps=3", "unknown setting layerwise.stepps; did you mean layerwise.steps?"),
        ("schedule.kind=linear", "schedule.kind must be cosine or constant"),
        ("noise.std=nan", "noise.std must be >= 0 and finite, got nan"),
        ("noise.mean=inf", "noise.mean must be finite, got inf"),
    ],
)
def test_load_config_refuses_bad_overrides(file: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("[", r"\[").replace("?", r"\?")):
        load_config(file, [override])


def test_load_config_refuses_a_value_in_place_of_a_table(file: Path) -> None:
    file.write_text(TEXT.replace('base.model = "some/model"', 'base = "folder"'))
    with pytest.raises(ValueError, match=r"^base must be a table, got 'folder'"):
        load_config(file, ["base.model=x"])


@pytest.mark.parametrize("alpha", [0.0, math.nan])
def test_lora_refuses_a_bad_alpha(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"^trained.alpha must be > 0 and finite"):
        Lora(alpha=alpha)


def test_load_config_refuses_all_loss_weights_zero(file: Path) -> None:
    with pytest.raises(ValueError, match="loss must be above 0 in at least one term"):
        load_config(file, ["loss.flow=0", "loss.prediction=0", "loss.attention=0"])


def test_load_config_refuses_a_file_that_is_not_toml(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("steps: 3")
    with pytest.raises(ValueError, match="is not TOML"):
        load_config(tmp_path / "config.toml")


def test_config_refuses_a_missing_table() -> None:
    with pytest.raises(ValueError, match="the setting base is missing"):
        config_from_tables({"data": {"directory": "samples"}})


def test_describe_warmup_warns_of_a_run_shorter_than_its_warmup(file: Path) -> None:
    assert (
        describe_warmup(load_config(file))
        == " after 100 steps of warm-up, but the run has only 10: it reaches 10% of the rate"
    )
    assert describe_warmup(load_config(file, ["run.steps=100"])) == " after 100 steps of warm-up"
    assert describe_warmup(load_config(file, ["schedule.warmup=0"])) == ""
