"""A small converted FLUX pipeline for cascades, and the prompt and settings of the tests."""

from typing import Any

import torch
from tiny_distill import build_tiny

from lineardit import Clear, linearize_
from lineardit.pipelines.plan import Settings

PROMPT = "a red circle"
FEW_STEPS = Settings(steps=2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def converted(native_size: int = 16) -> Any:
    pipe = build_tiny()
    linearize_(pipe, Clear(radius=2))
    pipe.vae.register_to_config(sample_size=native_size)
    return pipe
