"""Local attention as a method on grids of several frames."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention

from impls import PORTABLE
from lineardit.linearize import Clear, LayoutError, linearize_
from lineardit.linearize.layout import Layout, as_shape
from lineardit.linearize.methods import config_from_dict, config_to_dict
from lineardit.linearize.methods.clear import ClearAttention
from lineardit.linearize.methods.pooling import cell_side, count_cells, mean_pool, weighted_pool
from tiny_models import build, inputs_of, run

GRID = (3, 3, 5)  # frames, height, width


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("frame_radius", [0, -1, 1.0, True, "1"])
def test_clear_refuses_a_bad_frame_radius(frame_radius: object) -> None:
    with pytest.raises(ValueError, match="frame_radius must be an integer >= 1 or None"):
        Clear(radius=4, frame_radius=frame_radius)  # type: ignore[arg-type]


def test_config_to_dict_round_trips_frame_radius() -> None:
    config = Clear(radius=4, frame_radius=2)
    assert config_to_dict(config) == {"method": "clear", "radius": 4, "frame_radius": 2}
    assert config_from_dict(config_to_dict(config)) == config


@pytest.mark.parametrize("impl", [*PORTABLE, "auto"])
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        Clear(radius=1.5, frame_radius=1),
        Clear(radius=1.5, frame_radius=2),
        Clear(radius=1.5),
        Clear(radius=1.5, frame_radius=1, pool_size=2),
        Clear(radius=1.5, pool_tokens=9),
    ],
    ids=str,
)
def test_clear_attention_of_frames_is_the_definition(config: Clear, text_first: bool, impl: str) -> None:
    frames, height, width = GRID
    text_len, num_image = 2, frames * height * width
    kernel = ClearAttention(config, num_heads=2, head_dim=4).double()
    kernel.impl = impl
    kernel.observe(GRID)
    query, key, value = torch.randn(3, 1, 2, text_len + num_image, 4, dtype=torch.float64)
    out = kernel(query, key, value, Layout(GRID, text_len, text_first))

    image = slice(text_len, None) if text_first else slice(0, num_image)
    text = slice(0, text_len) if text_first else slice(num_image, None)
    mask = torch.ones(text_len + num_image, text_len + num_image, dtype=torch.bool)
    mask[image, image] = _near_by_hand(config)
    if config.pool_size or config.pool_tokens:
        side = config.pool_size or 3  # 2 would make 18 cells
        weight = torch.full((side, side), 1 / side**2, dtype=torch.float64)
        if config.pool_size:
            torch.nn.init.uniform_(kernel.pool_weight)
            weight = kernel.pool_weight.detach()
            out = kernel(query, key, value, Layout(GRID, text_len, text_first))
        pooled = [_pooled_by_hand(part[:, :, image], weight) for part in (key, value)]
        mask = torch.cat([mask, torch.ones(len(mask), pooled[0].shape[2], dtype=torch.bool)], 1)
        mask[text, text_len + num_image :] = False
        key, value = (torch.cat(both, 2) for both in zip((key, value), pooled, strict=True))
    assert torch.allclose(out, scaled_dot_product_attention(query, key, value, attn_mask=mask))


@pytest.mark.parametrize(
    ("config", "grid", "expected"),
    [
        (Clear(radius=5.01), (4, 4, 5), True),
        (Clear(radius=5, frame_radius=4), (4, 4, 5), False),
        (Clear(radius=5.01, frame_radius=4), (4, 4, 5), True),
        (Clear(radius=5.01, frame_radius=3), (4, 4, 5), False),
        (Clear(radius=5.01, frame_radius=1), (1, 4, 5), True),
        (Clear(radius=5.01, frame_radius=4, pool_size=2), (4, 4, 5), False),
    ],
)
def test_covers_asks_for_every_frame(config: Clear, grid: tuple[int, ...], expected: bool) -> None:
    assert ClearAttention(config, num_heads=1, head_dim=4).covers(Layout(grid, 3, True)) is expected


@pytest.mark.parametrize("frame_radius", [1, 2, 3, 9, None])
@pytest.mark.parametrize("pools", [{}, {"pool_size": 2}, {"pool_tokens": 3}], ids=str)
def test_pairs_counts_frames(frame_radius: int | None, pools: dict[str, int]) -> None:
    config = Clear(radius=2.5, frame_radius=frame_radius, **pools)
    num_cells = {"": 0, "pool_size": 18, "pool_tokens": 3}["".join(pools)]
    pairs = ClearAttention.pairs(config, GRID, 4, num_heads=1, head_dim=4)
    assert pairs == _near_by_hand(config).sum() + 45 * (4 + num_cells) + 4 * (4 + 45)


@pytest.mark.parametrize(
    ("grid", "pool_tokens", "side"),
    [((3, 8, 8), 48, 2), ((3, 8, 8), 47, 3), ((3, 5, 7), 3, 7), ((4, 64, 64), 4096, 2), ((1, 5, 7), 12, 2)],
)
def test_cell_side_counts_the_cells_of_all_frames(grid: tuple[int, ...], pool_tokens: int, side: int) -> None:
    assert cell_side(grid, pool_tokens) == side


def test_cell_side_refuses_more_frames_than_cells() -> None:
    with pytest.raises(LayoutError, match=r"got 2 for 3: raise pool_tokens, or pool by pool_size"):
        ClearAttention(Clear(radius=2, pool_tokens=2), num_heads=1, head_dim=4).observe(GRID)


@pytest.mark.parametrize("side", [2, 3])
def test_pools_keep_frames_apart(side: int) -> None:
    tokens = torch.randn(2, 3, 45, 4, dtype=torch.float64)
    weight = torch.randn(side, side, dtype=torch.float64)
    (out,) = weighted_pool([tokens], weight, GRID, count_cells(GRID, side))
    assert torch.allclose(out, _pooled_by_hand(tokens, weight))
    (mean,) = mean_pool([tokens], side, GRID, count_cells(GRID, side))
    assert torch.allclose(mean, _pooled_by_hand(tokens, torch.ones_like(weight) / side**2))


def test_pooling_gradients_of_frames_are_right() -> None:
    tokens = torch.randn(1, 1, 30, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, w: weighted_pool([x], w, (2, 3, 5), 12), (tokens, weight))


@pytest.mark.parametrize("impl", ["auto", "tiled"])
def test_clear_refuses_a_frame_radius_in_a_model_of_pictures_each_time(impl: str) -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, Clear(radius=99, frame_radius=1), impl=impl)
    for _ in range(2):
        with pytest.raises(LayoutError, match="frame_radius=1 is for models of several frames"):
            run(model, arguments)


@pytest.mark.parametrize("impl", [*PORTABLE, "auto"])
def test_clear_in_a_video_model_sees_the_frames_in_reach(impl: str) -> None:
    arguments = inputs_of("wan", grid=(4, 5), batch=1)
    latents = torch.randn(1, 4, 3, 8, 10)
    moved = latents.clone()
    moved[:, :, 2] += 1
    for frame_radius, expected in [(1, [False, False, True]), (2, [False, True, True]), (3, [True, True, True])]:
        model = build("wan", num_layers=1)
        linearize_(model, Clear(radius=3, frame_radius=frame_radius), impl=impl)
        outs = [run(model, {**arguments, "hidden_states": tokens}) for tokens in (latents, moved)]
        assert [
            bool((one != other).any()) for one, other in zip(*(out.unbind(2) for out in outs), strict=True)
        ] == expected
        run(model, {**arguments, "hidden_states": latents[:, :, :1]})


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("pools", [{"pool_size": 2}, {"pool_tokens": 12}], ids=str)
def test_clear_attention_of_frames_compiles_once_for_all_grids(pools: dict[str, int]) -> None:
    kernel = ClearAttention(Clear(radius=2.3, frame_radius=2, **pools), num_heads=1, head_dim=4).double()
    counter = CompileCounterWithBackend("aot_eager")

    def attend(query: Tensor, grid: Tensor) -> Tensor:
        layout = Layout(tuple(grid.shape), 2, True)
        assert not kernel.covers(layout)
        return kernel(query, query, query, layout)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    graphs = []
    for grid in [(3, 5, 5), (4, 6, 6), (3, 6, 5), (9, 4, 5)]:
        kernel.observe(grid)
        query = torch.randn(1, 1, 2 + grid[0] * grid[1] * grid[2], 4, dtype=torch.float64, requires_grad=True)
        results = [function(query, as_shape(*grid)) for function in (attend, compiled)]
        grads = [torch.autograd.grad(out.square().sum(), query)[0] for out in results]
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(grads[1], grads[0])
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[-1]


def _near_by_hand(config: Clear) -> Tensor:
    """[tokens, tokens] bool: the pairs of GRID within a window."""
    places = list(itertools.product(*map(range, GRID)))

    def near(here: tuple[int, ...], there: tuple[int, ...]) -> bool:
        frames, rows, cols = (abs(a - b) for a, b in zip(here, there, strict=True))
        return rows**2 + cols**2 < config.radius**2 and (config.frame_radius is None or frames < config.frame_radius)

    return torch.tensor([[near(here, there) for there in places] for here in places])


def _pooled_by_hand(tokens: Tensor, weight: Tensor) -> Tensor:
    """One cell of GRID after the other."""
    frames, height, width = GRID
    side = len(weight)
    cells = []
    for frame, top, left in itertools.product(range(frames), range(0, height, side), range(0, width, side)):
        rows, cols = range(top, min(top + side, height)), range(left, min(left + side, width))
        held = [(frame * height + row) * width + col for row, col in itertools.product(rows, cols)]
        weights = weight[: len(rows), : len(cols)].flatten()
        cells.append((tokens[:, :, held] * weights[:, None]).sum(2) * weight.sum() / weights.sum())
    return torch.stack(cells, dim=2)
