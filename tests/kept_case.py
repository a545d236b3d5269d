"""Samples that are recorded calls of a tiny model's denoiser, and settings of a run that trains on them."""

from pathlib import Path
from typing import Any

from tiny_distill import PROMPTS

from lineardit.distill.config import DistillConfig
from lineardit.distill.config_tables import config_from_tables
from lineardit.distill.data import TeacherSamples
from lineardit.distill.prepare import prepare


def kept(pipe: Any, folder: Path, size: tuple[int, int], **settings: Any) -> TeacherSamples:
    settings = {"sizes": [size], "steps": 2, "calls": 2, "shard_size": 2} | settings
    return TeacherSamples(prepare(pipe, PROMPTS[:3], folder, **settings))


def config_of(tmp_path: Path, base: str = "base", dtype: str = "float32", **tables: dict[str, Any]) -> DistillConfig:
    settings: dict[str, Any] = {
        "base": {"model": base, "dtype": dtype},
        "data": {"directory": str(tmp_path / "samples")},
        "method": {"method": "clear", "radius": 2},
        "trained": {"kind": "lora", "rank": 2},
        "loss": {"flow": 0.0, "prediction": 1.0, "attention": 1.0},
        "layerwise": {"steps": 2, "lr": 1e-2},
        "optimizer": {"lr": 1e-2},
        "run": {"directory": str(tmp_path / "run"), "steps": 6, "batch_size": 2},
        "validate": {"samples": 1, "every": 6},
    }
    return config_from_tables({name: settings.get(name, {}) | tables.get(name, {}) for name in settings | tables})
