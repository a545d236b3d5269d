"""A method added to `METHODS` by another package is converted, saved and loaded like the built-in ones."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from tiny_distill import build_tiny
from torch import nn

from lineardit import from_pretrained, linearize_, save_adapter
from lineardit.linearize.methods import METHODS, Method, config_from_dict


@dataclass(frozen=True, kw_only=True)
class Sharper:
    """Softmax of logits times `sharpness`."""

    sharpness: float


class SharperAttention(Method):
    def __init__(self, config: Sharper, *, num_heads: int, head_dim: int) -> None:
        super().__init__(config, num_heads=num_heads, head_dim=head_dim)
        self.bias = nn.Parameter(torch.zeros(num_heads))

    @staticmethod
    def pairs(config: Sharper, grid: Any, text_len: int, *, num_heads: int, head_dim: int) -> int:
        return (math.prod(grid) + text_len) ** 2

    def is_exact(self, layout: Any) -> bool:
        return self.config.sharpness == 1

    def forward(self, query: Any, key: Any, value: Any, layout: Any, *, scale: float | None = None) -> Any:
        scale = (query.shape[-1] ** -0.5 if scale is None else scale) * self.config.sharpness
        return nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)


def test_custom_method_converts_saves_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build_tiny()
    with pytest.raises(ValueError, match="expected a method config"):
        linearize_(base, Sharper(sharpness=2.0))
    monkeypatch.setitem(METHODS, Sharper, SharperAttention)
    base.save_pretrained(tmp_path / "base")
    pipe = FluxPipeline.from_pretrained(tmp_path / "base")
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 1, "max_sequence_length": 8}
    call |= {"output_type": "latent"}
    plain = pipe("a", generator=torch.Generator().manual_seed(0), **call).images
    report = linearize_(pipe, Sharper(sharpness=2.0))
    assert "Sharper(sharpness=2.0)" in str(report)
    images = pipe("a", generator=torch.Generator().manual_seed(0), **call).images
    assert not torch.allclose(images, plain, atol=1e-4)
    again = from_pretrained(save_adapter(pipe, tmp_path / "adapter"))
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again("a", generator=torch.Generator().manual_seed(0), **call).images, images)
    monkeypatch.delitem(METHODS, Sharper)
    with pytest.raises(ValueError, match=r"unknown method 'sharper'; choose from: clear.*, or import the package"):
        from_pretrained(tmp_path / "adapter")


def test_custom_method_named_like_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    namesake = dataclass(frozen=True, kw_only=True)(type("Clear", (), {"__module__": "mine"}))
    monkeypatch.setitem(METHODS, namesake, SharperAttention)
    with pytest.raises(ValueError, match=r"two methods are called 'clear', in lineardit\S+ and mine: rename"):
        config_from_dict({"method": "clear", "radius": 2})
