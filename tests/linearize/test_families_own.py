"""A model outside diffusers, converted with a family passed to `linearize_`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from own_attention import OwnAttention
from torch import Tensor, nn

from lineardit import Clear, UnsupportedModelError, linearize_, load_adapter_, restore_, save_adapter
from lineardit.linearize import Family, ForwardLayout
from lineardit.linearize.describe import describe_attention


class _Pond(nn.Module):
    """A user's own model: two layers of self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(OwnAttention() for _ in range(2))

    def forward(self, latents: Tensor) -> Tensor:
        tokens = latents.flatten(2).mT
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return tokens


def _read_pond(model: nn.Module, arguments: Mapping[str, Any]) -> ForwardLayout:
    return ForwardLayout(grid=tuple(arguments["latents"].shape[-2:]))


def test_custom_family_converts_saves_and_loads(tmp_path: Path) -> None:
    family = Family(name="pond", attention=("blocks.?",), read_layout=_read_pond, image_alone=("*",))
    model, latents = _Pond(), torch.randn(2, 16, 4, 5)
    base = model(latents)
    with pytest.raises(UnsupportedModelError, match=r"a Linear that Family.attention matches.*`\*`"):
        linearize_(model, Clear(radius=2.3), family=replace(family, attention=("blocks.*",)))
    linearize_(model, Clear(radius=2.3, pool_size=2), family=family)
    windowed = model(latents)
    assert describe_attention(model).startswith(
        "2/2 self-attention modules: 2 x Clear(radius=2.3, pool_size=2) (family"
    )
    save_adapter(model, tmp_path / "adapter")
    restore_(model)
    assert torch.equal(model(latents), base)
    load_adapter_(model, tmp_path / "adapter", family=family)
    assert torch.equal(model(latents), windowed)
    load_adapter_(model, tmp_path / "adapter")
    assert torch.equal(model(latents), windowed)


def test_attention_without_a_head_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(OwnAttention, "head_dim")
    family = Family(name="pond", attention=("blocks.?",), read_layout=_read_pond, image_alone=("*",))
    with pytest.raises(UnsupportedModelError, match=r"a OwnAttention .* none of `head_dim`, `inner_dim` and `to_q`"):
        linearize_(_Pond(), Clear(radius=2.3), family=family)


def test_family_refuses_a_string_for_globs() -> None:
    with pytest.raises(ValueError, match=r"Family.attention must be a tuple of names, such as \('blocks.\*',\)"):
        Family(name="pond", attention="blocks.*", read_layout=_read_pond)  # type: ignore[arg-type]
