"""Window methods: settings, the module against the definition, and in models."""

import json
import math
from typing import Any

import pytest
import torch
from receptive_field import attention_calls, changed_by_each_image_token
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention
from window_case import pairs_by_hand

from impls import PORTABLE
from lineardit import Clear, LayoutError, Neighborhood, SlidingTile, linearize_
from lineardit.kernels.window import Box, Circle, Window
from lineardit.linearize.layout import Layout, as_shape
from lineardit.linearize.methods import METHODS, config_from_dict, config_to_dict
from tiny_models import build, inputs_of, run

SHAPES: dict[Any, Window] = {
    Clear(radius=2.3): Circle(radius=2.3),
    Clear(radius=1.5, frame_radius=1): Circle(radius=1.5, frame_radius=1),
    Clear(radius=1.5, frame_radius=2): Circle(radius=1.5, frame_radius=2),
    Neighborhood(window=3): Box(window=(3, 3)),
    Neighborhood(window=(1, 5)): Box(window=(1, 5)),
    Neighborhood(window=(99, 3)): Box(window=(99, 3)),
    Neighborhood(window=3, dilation=2): Box(window=(3, 3), dilation=(2, 2)),
    Neighborhood(window=(3, 1), dilation=(1, 3)): Box(window=(3, 1), dilation=(1, 3)),
    Neighborhood(window=3, frame_radius=2): Box(window=(3, 3), frame_radius=2),
    SlidingTile(tile=2, window=1): Box(window=(1, 1), cell=(2, 2)),
    SlidingTile(tile=(2, 3), window=(1, 3)): Box(window=(1, 3), cell=(2, 3)),
    SlidingTile(tile=2, window=3): Box(window=(3, 3), cell=(2, 2)),
    SlidingTile(tile=(1, 2), window=(3, 1)): Box(window=(3, 1), cell=(1, 2)),
    SlidingTile(tile=9, window=1): Box(window=(1, 1), cell=(9, 9)),
    SlidingTile(tile=(1, 2), window=3, frame_radius=1): Box(window=(3, 3), cell=(1, 2), frame_radius=1),
}


def kernel_of(config: Any, *, num_heads: int = 1) -> Any:
    return METHODS[type(config)](config, num_heads=num_heads, head_dim=4)


@pytest.mark.parametrize(
    ("method", "entries", "message"),
    [
        ("clear", {"radius": 0}, "radius must be > 0"),
        ("clear", {"radius": -1.5}, "radius must be > 0"),
        ("clear", {"radius": math.nan}, "radius must be > 0"),
        ("clear", {"radius": math.inf}, "finite"),
        ("clear", {"radius": "16"}, "radius must be a number"),
        ("clear", {"radius": True}, "radius must be a number"),
        ("clear", {"radius": 4, "pool_size": 2, "pool_tokens": 9}, "not both"),
        ("clear", {"radius": 4, "pool_size": 1}, "pool_size must be an integer >= 2"),
        ("clear", {"radius": 4, "pool_size": 2.0}, "pool_size must be an integer"),
        ("clear", {"radius": 4, "pool_tokens": 0}, "pool_tokens must be an integer >= 1"),
        ("clear", {"radius": 4, "frame_radius": 0}, "frame_radius must be an integer >= 1 or None"),
        ("clear", {"radius": 4, "frame_radius": True}, "frame_radius must be an integer >= 1 or None"),
        ("neighborhood", {"window": 4}, "window must be odd"),
        ("neighborhood", {"window": (3, 4)}, "window must be odd"),
        ("neighborhood", {"window": 0}, "window must be an integer >= 1"),
        ("neighborhood", {"window": "3"}, "window must be an integer >= 1"),
        ("neighborhood", {"window": [3, 3, 3]}, r"two of them \(along the height, along the width\), got \(3, 3, 3\)"),
        ("neighborhood", {"window": 3, "dilation": 1.0}, "dilation must be an integer >= 1"),
        ("neighborhood", {"window": 3, "dilation": (2, True)}, "dilation must be an integer >= 1"),
        ("neighborhood", {"window": 3, "frame_radius": 0}, "frame_radius must be an integer >= 1 or None"),
        ("slidingtile", {"tile": 8, "window": 2}, "window must be odd"),
        ("slidingtile", {"tile": 0, "window": 3}, "tile must be an integer >= 1"),
        ("slidingtile", {"tile": (8, 8, 8), "window": 3}, r"tile must be .*, got \(8, 8, 8\)"),
        ("slidingtile", {"tile": 8, "window": (3, 1.5)}, "window must be an integer >= 1"),
        ("slidingtile", {"tile": 8}, "lacks required settings: window"),
    ],
)
def test_bad_settings_are_refused(method: str, entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict({"method": method, **entries})


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_settings_give_the_shape_and_round_trip(config: Any) -> None:
    assert config.shape == SHAPES[config]
    again = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    assert again == config and hash(again) == hash(config)


@pytest.mark.parametrize("impl", [*PORTABLE, "auto"])
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_window_attention_matches_the_definition(config: Any, text_first: bool, impl: str) -> None:
    grid = (5, 7) if config.frame_radius is None else (3, 4, 3)
    text_len, num_image = 3, math.prod(grid)
    kernel = kernel_of(config, num_heads=2)
    kernel.impl = impl
    kernel.prepare_for(grid)
    query, key, value = torch.randn(3, 2, 2, text_len + num_image, 4, dtype=torch.float64)
    text_mask = torch.tensor([[True, True, False], [True, True, True]])
    out = kernel(query, key, value, Layout(grid, text_len, text_first, text_mask), scale=0.7)

    image = slice(text_len, None) if text_first else slice(0, num_image)
    text = slice(0, text_len) if text_first else slice(num_image, None)
    mask = torch.ones(2, 1, text_len + num_image, text_len + num_image, dtype=torch.bool)
    mask[:, :, image, image] = pairs_by_hand(grid, config.shape)
    mask[:, :, :, text] &= text_mask[:, None, None]
    assert torch.allclose(out, scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.7))


COUNTED = [
    *SHAPES,
    *(Clear(radius=radius) for radius in (5, 5.01, 1e200)),  # the diagonal of 4 x 5 is 5 long
    *(Clear(radius=99, frame_radius=frame_radius) for frame_radius in (2, 3, 9)),
    *(Neighborhood(window=(3, 5), frame_radius=frame_radius) for frame_radius in (1, 2, 3, 9)),
    *(Neighborhood(window=5, frame_radius=frame_radius) for frame_radius in (2, 3)),
]
COUNTED_AT = [(5, 7), (6, 4), (4, 5), (1, 9), (3, 4, 5)]


@pytest.mark.parametrize(
    ("config", "grid"),
    [(config, grid) for config in COUNTED for grid in COUNTED_AT if config.frame_radius is None or len(grid) == 3],
    ids=str,
)
def test_pairs_and_covers_are_exact(config: Any, grid: tuple[int, ...]) -> None:
    in_window, num_image = pairs_by_hand(grid, config.shape), math.prod(grid)
    pairs = METHODS[type(config)].pairs(config, grid, 4, num_heads=1, head_dim=4)
    assert pairs == in_window.sum() + num_image * 4 + 4 * (4 + num_image)
    assert kernel_of(config).is_exact(Layout(grid, 4, True)) == in_window.all()


@pytest.mark.parametrize("family", ["flux", "unet"])
@pytest.mark.parametrize(
    ("covering", "smaller"),
    [
        (Neighborhood(window=(5, 7)), Neighborhood(window=3)),
        (SlidingTile(tile=3, window=3), SlidingTile(tile=3, window=1)),
    ],
    ids=["neighborhood", "slidingtile"],
)
def test_windows_that_cover_the_grid_are_bit_equal(covering: Any, smaller: Any, family: str) -> None:
    model, arguments = build(family), inputs_of(family)
    base = run(model, arguments)
    linearize_(model, covering)
    assert torch.equal(run(model, arguments), base)
    linearize_(model, smaller)
    assert not torch.allclose(run(model, arguments), base, atol=1e-4)


@pytest.mark.parametrize("family", ["flux", "unet"])
@pytest.mark.parametrize(
    "config",
    [
        Neighborhood(window=3),
        Neighborhood(window=(3, 1), dilation=2),
        SlidingTile(tile=(2, 1), window=(1, 3)),
    ],
    ids=str,
)
def test_receptive_field_in_a_model_is_the_window(config: Any, family: str) -> None:
    model = build(family)
    linearize_(model, config, impl="tiled")
    for name, (module, args, kwargs) in attention_calls(model, inputs_of(family, batch=1)).items():
        in_window = pairs_by_hand(module._lineardit_level.grid, config.shape)
        image_changed, text_changed = changed_by_each_image_token(module, args, kwargs, in_window.shape[0])
        assert torch.equal(image_changed, in_window), name
        assert text_changed.all(), name


@pytest.mark.parametrize("impl", ["auto", "tiled"])
@pytest.mark.parametrize("config", [Clear(radius=99, frame_radius=1), Neighborhood(window=3, frame_radius=1)], ids=str)
def test_frame_radius_is_refused_in_an_image_model_on_every_call(config: Any, impl: str) -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, config, impl=impl)
    for _ in range(2):
        with pytest.raises(LayoutError, match="frame_radius=1 is for models with several frames"):
            run(model, arguments)


@pytest.mark.parametrize("impl", [*PORTABLE, "auto"])
def test_window_in_a_video_model_sees_frames_within_frame_radius(impl: str) -> None:
    arguments = inputs_of("wan", grid=(4, 5), batch=1)
    latents = torch.randn(1, 4, 3, 8, 10)
    perturbed = latents.clone()
    perturbed[:, :, 2] += 1
    for frame_radius, expected in [(1, [False, False, True]), (2, [False, True, True]), (3, [True, True, True])]:
        model = build("wan", num_layers=1)
        linearize_(model, Clear(radius=3, frame_radius=frame_radius), impl=impl)
        outs = [run(model, {**arguments, "hidden_states": tokens}) for tokens in (latents, perturbed)]
        assert [
            bool((one != other).any()) for one, other in zip(*(out.unbind(2) for out in outs), strict=True)
        ] == expected
        run(model, {**arguments, "hidden_states": latents[:, :, :1]})


@pytest.mark.parametrize(
    ("config", "grids"),
    [
        (Neighborhood(window=3, dilation=(1, 2)), [(5, 5), (6, 6), (6, 5), (4, 9)]),
        (Clear(radius=2.3, frame_radius=2, pool_size=2), [(3, 5, 5), (4, 6, 6), (3, 6, 5), (9, 4, 5)]),
        (Clear(radius=2.3, frame_radius=2, pool_tokens=12), [(3, 5, 5), (4, 6, 6), (3, 6, 5), (9, 4, 5)]),
    ],
    ids=str,
)
def test_window_attention_adds_no_graph_after_the_second_grid(config: Any, grids: list[tuple[int, ...]]) -> None:
    torch._dynamo.reset()
    kernel, counter = kernel_of(config).double(), CompileCounterWithBackend("aot_eager")

    def attend(query: Tensor, grid: Tensor) -> Tensor:
        layout = Layout(tuple(grid.shape), 2, True)
        assert not kernel.is_exact(layout)
        return kernel(query, query, query, layout)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    graphs = []
    for grid in grids:
        kernel.prepare_for(grid)
        query = torch.randn(1, 1, 2 + math.prod(grid), 4, dtype=torch.float64, requires_grad=True)
        results = [function(query, as_shape(*grid)) for function in (attend, compiled)]
        grads = [torch.autograd.grad(out.square().sum(), query)[0] for out in results]
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(grads[1], grads[0])
        graphs.append(counter.frame_count)
    torch._dynamo.reset()
    assert graphs[1] == graphs[-1]
