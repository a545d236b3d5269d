"""Configs in which checkpoints of one class differ: the grid and the other tokens are found in each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from receptive_field import attention_calls, changed_by_each_image_token

from lineardit.linearize import Clear, linearize_
from lineardit.linearize.measures.step_inputs import step_inputs
from tiny_models import MODELS, build, inputs_of, position_ids, run

GRID, TEXT_LEN = (4, 5), 3


def _nothing() -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Changes to a tiny model's config, and arguments that extend or replace the usual ones."""

    family: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]] = field(default=_nothing)


VARIANTS = {
    "flux-one-head": Variant(family="flux", config={"num_attention_heads": 1}),
    "flux-head-of-40": Variant(family="flux", config={"attention_head_dim": 40, "axes_dims_rope": (8, 16, 16)}),
    "flux-double-blocks-alone": Variant(family="flux", config={"num_single_layers": 0}),
    "flux-controlnet-union": Variant(
        family="flux-controlnet",
        config={"num_mode": 3},
        inputs=lambda: {"controlnet_mode": torch.ones(1, 1, dtype=torch.long)},
    ),
    "sd3-norm-free": Variant(family="sd3", config={"qk_norm": None, "dual_attention_layers": ()}),
    "sd3-controlnet-without-text": Variant(
        family="sd3-controlnet", config={"joint_attention_dim": None}, inputs=lambda: {"encoder_hidden_states": None}
    ),
    "sd3-controlnet-of-tokens": Variant(
        family="sd3-controlnet",
        config={"joint_attention_dim": None, "use_pos_embed": False, "pos_embed_type": None},
        inputs=lambda: {"encoder_hidden_states": None, "hidden_states": torch.randn(1, 20, 32)},
    ),
    "hunyuan-image-one-text": Variant(
        family="hunyuan-image",
        config={"text_embed_2_dim": None},
        inputs=lambda: {"encoder_hidden_states_2": None, "encoder_attention_mask_2": None},
    ),
    "wan-with-an-image": Variant(
        family="wan",
        config={"added_kv_proj_dim": 24, "image_dim": 16},
        inputs=lambda: {"encoder_hidden_states_image": torch.randn(1, 257, 16)},
    ),
    "z-image-more-refiners": Variant(family="z-image", config={"n_refiner_layers": 2}),
}


def test_controlnet_union_without_its_mode_raises_the_upstream_error() -> None:
    model = build("flux-controlnet", num_mode=3)
    assert step_inputs(model, "flux", (8, 8))["controlnet_mode"].shape == (1, 1)
    linearize_(model, Clear(radius=2.3))
    with pytest.raises(ValueError, match="controlnet_mode"):
        run(model, inputs_of("flux-controlnet"))


@pytest.mark.parametrize("name", [name for name in VARIANTS if hasattr(diffusers, MODELS[VARIANTS[name].family].needs)])
def test_variants_match_the_base_when_covered_and_the_window_otherwise(name: str) -> None:
    variant = VARIANTS[name]
    model = build(variant.family, **variant.config)
    arguments = inputs_of(variant.family, grid=GRID, text_len=TEXT_LEN, batch=1) | variant.inputs()
    base = run(model, arguments)
    for impl in ("auto", "tiled"):
        linearize_(model, Clear(radius=50), impl=impl)
        out = run(model, arguments)
        assert torch.equal(out, base) if impl == "auto" else torch.allclose(out, base, atol=1e-5)
    linearize_(model, Clear(radius=2.3), impl="tiled")
    positions = position_ids(GRID)[:, 1:]
    in_window = (positions[:, None] - positions[None]).square().sum(-1) < 2.3**2
    for module, args, kwargs in attention_calls(model, arguments).values():
        frames = module._lineardit_level.grid[0] if len(module._lineardit_level.grid) == 3 else 1
        image_changed, _ = changed_by_each_image_token(module, args, kwargs, in_window.shape[0] * frames)
        assert torch.equal(image_changed, in_window.repeat(frames, frames))
