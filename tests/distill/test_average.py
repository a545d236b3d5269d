"""The moving average of the trained weights: its values, its use in validation and adapters, and resuming."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_distill import trained_weights

from lineardit import from_pretrained
from lineardit.distill.config import DistillConfig
from lineardit.distill.train import distill
from lineardit.distill.validation import Validation

MakeConfig = Callable[..., DistillConfig]
POOLED = {"method": "clear", "radius": 2, "pool_size": 2}
FIRST, LAST = 2, 7  # last step of the layerwise phase, and of the run


def _config(make_config: MakeConfig, ema: float = 0.6, **tables: Any) -> DistillConfig:
    return make_config(
        method=POOLED,
        trained={"kind": "lora", "rank": 2, "ema": ema},
        layerwise={"steps": FIRST, "lr": 1e-2},
        run={"steps": LAST - FIRST},
        save={"every": 1, "keep_last": LAST},
        **tables,
    )


def _stored(run: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / f"step-{step:08d}" / f"{name}.safetensors")


def _by_pefts_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    parts = {"lineardit_lora.down": "lora_A.weight", "lineardit_lora.up": "lora_B.weight"}
    for suffix, peft_suffix in parts.items():
        weights = {name.replace(suffix, peft_suffix): tensor for name, tensor in weights.items()}
    return weights


def test_average_is_validated_saved_and_resumed(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    validated: dict[int, dict[str, torch.Tensor]] = {}
    monkeypatch.setattr(
        Validation,
        "run",
        lambda self, step: validated.update(
            {step: {name: tensor.detach().clone() for name, tensor in self.pair.trained.items()}}
        ),
    )
    config = _config(make_config, validate={"samples": 2, "every": 4})
    run = config.run.folder
    with caplog.at_level("INFO"):
        distill(config)
    assert "evaluated and saved as their moving average with decay 0.6" in caplog.text

    expected: dict[str, torch.Tensor] = {}
    for step in range(1, LAST + 1):
        weights, averages = _stored(run, step, "trained"), _stored(run, step, "average")
        num_averaged = step if step <= FIRST else step - FIRST  # each phase starts a new average
        decay = 0 if num_averaged == 1 else min(0.6, num_averaged / (num_averaged + 9))
        expected = {name: decay * expected.get(name, tensor) + (1 - decay) * tensor for name, tensor in weights.items()}
        assert all(tensor.dtype == torch.float32 for tensor in averages.values())
        assert all(torch.allclose(averages[name], tensor, atol=1e-6) for name, tensor in expected.items())
        assert num_averaged == 1 or not all(torch.equal(averages[name], tensor) for name, tensor in weights.items())
        adapter = load_file(run / f"step-{step:08d}" / "adapter" / "lineardit.safetensors")
        assert all(torch.equal(adapter[name], tensor) for name, tensor in _by_pefts_names(averages).items())
    last = _stored(run, LAST, "average")
    assert validated.keys() == {4, LAST}
    for step, weights in validated.items():
        assert all(torch.equal(weights[name], tensor) for name, tensor in _stored(run, step, "average").items())
    assert all(torch.equal(trained_weights(run)[name], tensor) for name, tensor in _by_pefts_names(last).items())
    from_pretrained(run / "adapter")

    unaveraged = _stored(run, LAST, "trained")
    for step in (1, FIRST, 4):
        distill(config, resume=step)
        for name, tensors in (("trained", unaveraged), ("average", last)):
            resumed = _stored(run, LAST, name)
            assert all(torch.equal(resumed[key], tensor) for key, tensor in tensors.items()), (step, name)


def test_average_does_not_change_the_trained_weights(make_config: MakeConfig, tmp_path: Path) -> None:
    """A run without an average writes no file for it, and cannot be resumed with one."""
    configs = {ema: make_config(
        trained={"kind": "lora", "rank": 2, "ema": ema}, run={"directory": str(tmp_path / str(ema)), "steps": 2}
    ) for ema in (0.0, 0.9)}  # fmt: skip
    for config in configs.values():
        distill(config)
    unaveraged, averaged = (_stored(config.run.folder, 2, "trained") for config in configs.values())
    assert all(torch.equal(averaged[name], tensor) for name, tensor in unaveraged.items())
    assert not list(configs[0.0].run.folder.rglob("average*"))
    changed = make_config(
        trained=configs[0.9].trained.__dict__ | {"kind": "lora"}, run={"directory": str(tmp_path / "0.0")}
    )
    with pytest.raises(ValueError, match=r"trained.ema was 0.0, now 0.9"):
        distill(changed, resume="latest")


def test_average_with_decay_one_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"^trained.ema must be in \[0, 1\), 0 for no average, got 1.0"):
        make_config(trained={"kind": "attention", "ema": 1.0})
