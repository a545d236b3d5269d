"""Sliding tile attention as a method: settings, the module against the definition, and in models."""

import json
import math

import pytest
import torch
from receptive_field import attention_calls, changed_by_each_image_token
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from impls import PORTABLE
from lineardit import SlidingTile, linearize_
from lineardit.linearize.layout import Layout
from lineardit.linearize.methods import METHODS, config_from_dict, config_to_dict
from tiny_models import build, inputs_of, run

CONFIGS = [
    SlidingTile(tile=2, window=1),
    SlidingTile(tile=(2, 3), window=(1, 3)),
    SlidingTile(tile=2, window=3),
    SlidingTile(tile=(1, 2), window=(3, 1)),
    SlidingTile(tile=9, window=1),
]


def near_by_hand(grid: tuple[int, ...], config: SlidingTile) -> Tensor:
    """[image tokens, image tokens] bool: the key's tile is in the rectangle around the query's, moved into the grid."""
    frames, *sizes = (1, *grid)[-3:]
    axes = []
    for axis, size in enumerate(sizes):
        tile, window = (pair if isinstance(pair, int) else pair[axis] for pair in (config.tile, config.window))
        count, half = math.ceil(size / tile), window // 2
        middle = [min(max(place // tile, half), max(count - 1 - half, half)) for place in range(size)]
        axes.append([[abs(other // tile - middle[place]) <= half for other in range(size)] for place in range(size)])
    frame = torch.arange(frames)
    in_time = (frame[:, None] - frame).abs() < (config.frame_radius or frames)
    rows, columns = (torch.tensor(axis).byte() for axis in axes)
    return torch.kron(in_time.byte(), torch.kron(rows, columns)).bool()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"tile": 8, "window": 2}, "window must be odd"),
        ({"tile": 0, "window": 3}, "tile must be an integer >= 1"),
        ({"tile": (8, 8, 8), "window": 3}, r"tile must be .*, got \(8, 8, 8\)"),
        ({"tile": 8, "window": (3, 1.5)}, "window must be an integer >= 1"),
        ({"tile": 8}, "not given: window|missing 1 required"),
    ],
)
def test_sliding_tile_refuses_bad_settings(settings: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        config_from_dict({"method": "slidingtile", **settings})


@pytest.mark.parametrize("config", [*CONFIGS, SlidingTile(tile=8, window=3, frame_radius=2)], ids=str)
def test_config_to_dict_round_trips_sliding_tiles(config: SlidingTile) -> None:
    settings = config_to_dict(config)
    assert settings["method"] == "slidingtile"
    again = config_from_dict(json.loads(json.dumps(settings)))
    assert again == config and hash(again) == hash(config)


@pytest.mark.parametrize("impl", [*PORTABLE, "auto"])
@pytest.mark.parametrize("config", [*CONFIGS, SlidingTile(tile=(1, 2), window=3, frame_radius=1)], ids=str)
def test_sliding_tile_is_the_definition(config: SlidingTile, impl: str) -> None:
    grid = (5, 7) if config.frame_radius is None else (3, 4, 7)
    text_len, num_image = 3, math.prod(grid)
    kernel = METHODS[SlidingTile](config, num_heads=2, head_dim=4)
    kernel.impl = impl
    kernel.observe(grid)
    query, key, value = torch.randn(3, 1, 2, text_len + num_image, 4, dtype=torch.float64)
    out = kernel(query, key, value, Layout(grid, text_len, True))
    mask = torch.ones(text_len + num_image, text_len + num_image, dtype=torch.bool)
    mask[text_len:, text_len:] = near_by_hand(grid, config)
    assert torch.allclose(out, scaled_dot_product_attention(query, key, value, attn_mask=mask))


@pytest.mark.parametrize("grid", [(5, 7), (6, 4), (1, 9), (3, 4, 6)], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_pairs_and_covers_of_sliding_tiles_are_exact(config: SlidingTile, grid: tuple[int, ...]) -> None:
    near, num_image = near_by_hand(grid, config), math.prod(grid)
    pairs = METHODS[SlidingTile].pairs(config, grid, 4, num_heads=1, head_dim=4)
    assert pairs == near.sum() + num_image * 4 + 4 * (4 + num_image)
    kernel = METHODS[SlidingTile](config, num_heads=1, head_dim=4)
    assert kernel.covers(Layout(grid, 4, True)) == near.all()


@pytest.mark.parametrize("family", ["flux", "unet"])
def test_sliding_tiles_that_cover_the_grid_are_bit_equal(family: str) -> None:
    model, arguments = build(family), inputs_of(family)
    base = run(model, arguments)
    linearize_(model, SlidingTile(tile=3, window=3))
    assert torch.equal(run(model, arguments), base)
    linearize_(model, SlidingTile(tile=3, window=1))
    assert not torch.allclose(run(model, arguments), base, atol=1e-4)


@pytest.mark.parametrize("family", ["flux", "unet"])
def test_sliding_tiles_are_the_receptive_field_in_a_model(family: str) -> None:
    model, config = build(family), SlidingTile(tile=(2, 1), window=(1, 3))
    linearize_(model, config, impl="tiled")
    for name, (module, args, kwargs) in attention_calls(model, inputs_of(family, batch=1)).items():
        near = near_by_hand(module._lineardit_level.grid, config)
        image_changed, text_changed = changed_by_each_image_token(module, args, kwargs, near.shape[0])
        assert torch.equal(image_changed, near), name
        assert text_changed.all(), name
