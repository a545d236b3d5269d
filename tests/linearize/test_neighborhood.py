"""Neighborhood attention as a method: settings, the module against the definition, and in models."""

import json
import math
from collections.abc import Iterator

import pytest
import torch
from receptive_field import attention_calls, changed_by_each_image_token
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention

from impls import PORTABLE
from lineardit import LayoutError, Neighborhood, linearize_
from lineardit.linearize.layout import Layout, as_shape
from lineardit.linearize.methods import METHODS, config_from_dict, config_to_dict
from tiny_models import build, inputs_of, run

CONFIGS = [
    Neighborhood(window=3),
    Neighborhood(window=(1, 5)),
    Neighborhood(window=(99, 3)),
    Neighborhood(window=3, dilation=2),
    Neighborhood(window=(3, 1), dilation=(1, 3)),
]


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def near_by_hand(grid: tuple[int, ...], config: Neighborhood) -> Tensor:
    """[image tokens, image tokens] bool: on each axis the `window` fellows whose middle is nearest."""
    frames, *sizes = (1, *grid)[-3:]
    axes = []
    for axis, size in enumerate(sizes):
        window, dilation = (pair if isinstance(pair, int) else pair[axis] for pair in (config.window, config.dilation))
        near = torch.zeros(size, size, dtype=torch.bool)
        for place in range(size):
            fellows = list(range(place % dilation, size, dilation))
            windows = [fellows[start : start + window] for start in range(max(len(fellows) - window, 0) + 1)]
            middles = [(one[0] + one[-1]) / 2 for one in windows]
            near[place, min(zip(windows, middles, strict=True), key=lambda one: abs(one[1] - place))[0]] = True
        axes.append(near)
    frame = torch.arange(frames)
    in_time = (frame[:, None] - frame).abs() < (config.frame_radius or frames)
    return torch.kron(in_time.byte(), torch.kron(axes[0].byte(), axes[1].byte())).bool()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"window": 4}, "window must be odd"),
        ({"window": (3, 4)}, "window must be odd"),
        ({"window": 0}, "window must be an integer >= 1"),
        ({"window": "3"}, "window must be an integer >= 1"),
        ({"window": [3, 3, 3]}, r"two of them \(along the height, along the width\), got \(3, 3, 3\)"),
        ({"window": 3, "dilation": 1.0}, "dilation must be an integer >= 1"),
        ({"window": 3, "dilation": (2, True)}, "dilation must be an integer >= 1"),
        ({"window": 3, "frame_radius": 0}, "frame_radius must be an integer >= 1 or None"),
    ],
)
def test_neighborhood_refuses_bad_settings(settings: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Neighborhood(**settings)
    with pytest.raises(ValueError, match=told):
        config_from_dict({"method": "neighborhood", **settings})


@pytest.mark.parametrize("config", [*CONFIGS, Neighborhood(window=7, frame_radius=2)], ids=str)
def test_config_to_dict_round_trips_a_neighborhood(config: Neighborhood) -> None:
    settings = config_to_dict(config)
    assert settings["method"] == "neighborhood"
    again = config_from_dict(json.loads(json.dumps(settings)))
    assert again == config and hash(again) == hash(config)


@pytest.mark.parametrize("impl", [*PORTABLE, "auto"])
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("config", [*CONFIGS, Neighborhood(window=3, frame_radius=2)], ids=str)
def test_neighborhood_is_the_definition(config: Neighborhood, text_first: bool, impl: str) -> None:
    grid = (5, 7) if config.frame_radius is None else (3, 4, 3)
    text_len, num_image = 3, math.prod(grid)
    kernel = METHODS[Neighborhood](config, num_heads=2, head_dim=4)
    kernel.impl = impl
    kernel.observe(grid)
    query, key, value = torch.randn(3, 2, 2, text_len + num_image, 4, dtype=torch.float64)
    text_mask = torch.tensor([[True, True, False], [True, True, True]])
    out = kernel(query, key, value, Layout(grid, text_len, text_first, text_mask), scale=0.7)

    image = slice(text_len, None) if text_first else slice(0, num_image)
    mask = torch.ones(2, 1, text_len + num_image, text_len + num_image, dtype=torch.bool)
    mask[:, :, image, image] = near_by_hand(grid, config)
    text = slice(0, text_len) if text_first else slice(num_image, None)
    mask[:, :, :, text] &= text_mask[:, None, None]
    assert torch.allclose(out, scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.7))


@pytest.mark.parametrize("grid", [(5, 7), (6, 4), (1, 9), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_pairs_and_covers_of_a_neighborhood_are_exact(config: Neighborhood, grid: tuple[int, ...]) -> None:
    near, num_image = near_by_hand(grid, config), math.prod(grid)
    pairs = METHODS[Neighborhood].pairs(config, grid, 4, num_heads=1, head_dim=4)
    assert pairs == near.sum() + num_image * 4 + 4 * (4 + num_image)
    kernel = METHODS[Neighborhood](config, num_heads=1, head_dim=4)
    assert kernel.covers(Layout(grid, 4, True)) == near.all()


def test_pairs_and_covers_of_a_neighborhood_count_frames() -> None:
    for frame_radius in (1, 2, 3, 9):
        config = Neighborhood(window=(3, 5), frame_radius=frame_radius)
        pairs = METHODS[Neighborhood].pairs(config, (3, 4, 5), 0, num_heads=1, head_dim=4)
        assert pairs == near_by_hand((3, 4, 5), config).sum()
        kernel = METHODS[Neighborhood](Neighborhood(window=5, frame_radius=frame_radius), num_heads=1, head_dim=4)
        assert kernel.covers(Layout((3, 4, 5), 2, True)) == (frame_radius >= 3)


@pytest.mark.parametrize("family", ["flux", "unet"])
def test_neighborhood_that_covers_the_grid_is_bit_equal(family: str) -> None:
    model, arguments = build(family), inputs_of(family)
    base = run(model, arguments)
    linearize_(model, Neighborhood(window=(5, 7)))
    assert torch.equal(run(model, arguments), base)
    linearize_(model, Neighborhood(window=3))
    assert not torch.allclose(run(model, arguments), base, atol=1e-4)


@pytest.mark.parametrize("family", ["flux", "unet"])
@pytest.mark.parametrize("config", [Neighborhood(window=3), Neighborhood(window=(3, 1), dilation=2)], ids=str)
def test_neighborhood_is_the_receptive_field_in_a_model(config: Neighborhood, family: str) -> None:
    model = build(family)
    linearize_(model, config, impl="tiled")
    for name, (module, args, kwargs) in attention_calls(model, inputs_of(family, batch=1)).items():
        near = near_by_hand(module._lineardit_level.grid, config)
        image_changed, text_changed = changed_by_each_image_token(module, args, kwargs, near.shape[0])
        assert torch.equal(image_changed, near), name
        assert text_changed.all(), name


def test_neighborhood_refuses_a_frame_radius_in_a_model_of_pictures() -> None:
    model = build("flux")
    linearize_(model, Neighborhood(window=3, frame_radius=1))
    with pytest.raises(LayoutError, match="frame_radius=1 is for models of several frames"):
        run(model, inputs_of("flux"))


@pytest.mark.usefixtures("fresh_dynamo")
def test_neighborhood_compiles_once_for_all_grids() -> None:
    kernel = METHODS[Neighborhood](Neighborhood(window=3, dilation=(1, 2)), num_heads=1, head_dim=4)
    counter = CompileCounterWithBackend("aot_eager")

    def attend(query: Tensor, grid: Tensor) -> Tensor:
        layout = Layout(tuple(grid.shape), 2, True)
        assert not kernel.covers(layout)
        return kernel(query, query, query, layout)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    graphs = []
    for grid in [(5, 5), (6, 6), (6, 5), (4, 9)]:
        kernel.observe(grid)
        query = torch.randn(1, 1, 2 + math.prod(grid), 4)
        torch.testing.assert_close(compiled(query, as_shape(*grid)), attend(query, as_shape(*grid)))
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[-1]
