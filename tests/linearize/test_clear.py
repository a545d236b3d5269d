"""Local attention as a method: settings, and pooled cells against the definition, forward and backward."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from impls import PORTABLE
from lineardit.linearize.layout import Layout
from lineardit.linearize.methods import METHODS, Clear, config_from_dict, config_to_dict
from lineardit.linearize.methods.clear import ClearAttention
from lineardit.linearize.methods.pooling import cell_side, cell_sums, count_cells, mean_pool, weighted_pool

GRIDS = [(5, 7), (6, 4), (1, 5), (3, 2)]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"radius": 0}, "radius must be > 0"),
        ({"radius": -1.5}, "radius must be > 0"),
        ({"radius": float("nan")}, "radius must be > 0"),
        ({"radius": float("inf")}, "finite"),
        ({"radius": "16"}, "radius must be a number"),
        ({"radius": True}, "radius must be a number"),
        ({"radius": 4, "pool_size": 2, "pool_tokens": 9}, "not both"),
        ({"radius": 4, "pool_size": 1}, "pool_size must be an integer >= 2"),
        ({"radius": 4, "pool_size": 2.0}, "pool_size must be an integer"),
        ({"radius": 4, "pool_tokens": 0}, "pool_tokens must be an integer >= 1"),
    ],
)
def test_clear_refuses_bad_settings(settings: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Clear(**settings)
    with pytest.raises(ValueError, match=told):
        config_from_dict({"method": "clear", **settings})


@pytest.mark.parametrize("config", [Clear(radius=16), Clear(radius=2.5, pool_size=4), Clear(radius=8, pool_tokens=64)])
def test_config_to_dict_round_trips(config: Clear) -> None:
    settings = config_to_dict(config)
    assert settings["method"] == "clear"
    assert None not in settings.values()
    assert config_from_dict(settings) == config


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "claer", "radius": 4}, r"unknown method 'claer' \(did you mean clear\?\)"),
        ({"method": "clear", "raduis": 4}, r"unknown setting 'raduis' of clear \(did you mean radius\?\)"),
        ({"method": "clear"}, "not given: radius"),
        ({"radius": 4}, "must look like"),
        ({"method": ["clear"]}, "must look like"),
        ("clear", "must look like"),
    ],
)
def test_config_from_dict_refuses_and_suggests(settings: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        config_from_dict(settings)  # type: ignore[arg-type]


def test_methods_have_configs_that_cannot_change() -> None:
    for cls in METHODS:
        assert cls.__dataclass_params__.frozen
        assert all(field.kw_only for field in cls.__dataclass_fields__.values())


@pytest.mark.parametrize(
    ("grid", "pool_tokens", "side"),
    [
        ((64, 64), 1024, 2),
        ((64, 64), 1023, 3),
        ((128, 64), 1024, 3),
        ((512, 512), 1024, 16),
        ((5, 7), 1, 7),
        ((1, 1), 9, 2),
    ],
)
def test_cell_side_is_the_smallest(grid: tuple[int, int], pool_tokens: int, side: int) -> None:
    assert cell_side(grid, pool_tokens) == side


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("side", [2, 3, 4])
def test_weighted_pool_is_the_definition(grid: tuple[int, int], side: int) -> None:
    tokens = torch.randn(2, 3, grid[0] * grid[1], 4, dtype=torch.float64)
    weight = torch.randn(side, side, dtype=torch.float64)
    (out,) = weighted_pool([tokens], weight, grid, count_cells(grid, side))
    assert torch.allclose(out, _pooled_by_hand(tokens, weight, grid))
    (mean,) = mean_pool([tokens], side, grid, count_cells(grid, side))
    assert torch.allclose(mean, _pooled_by_hand(tokens, torch.full_like(weight, 1 / side**2), grid))


def test_weighted_pool_of_full_cells_takes_weights_that_add_up_to_nothing() -> None:
    weight = torch.tensor([[1.0, -1.0], [2.0, -2.0]], requires_grad=True)
    tokens = torch.randn(1, 1, 24, 2)
    (out,) = weighted_pool([tokens], weight, (4, 6), 6)
    assert out.isfinite().all()
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("grid", [(5, 7), (4, 4)])
def test_pooling_gradients_are_right(grid: tuple[int, int]) -> None:
    tokens = torch.randn(2, 1, grid[0] * grid[1], 2, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(3, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, w: weighted_pool([x], w, grid, count_cells(grid, 3)), (tokens, weight))
    torch.autograd.gradcheck(lambda x: mean_pool([x], 3, grid, count_cells(grid, 3)), (tokens,))


def test_cell_sums_is_a_sound_operator() -> None:
    tokens, weight = torch.randn(1, 2, 35, 4, requires_grad=True), torch.rand(2, 2, requires_grad=True)
    torch.library.opcheck(cell_sums, (tokens, weight, 5, 7, 12))


@pytest.mark.parametrize("impl", [*PORTABLE, "auto"])
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize(
    "config", [Clear(radius=2.3, pool_size=2), Clear(radius=2.3, pool_tokens=5), Clear(radius=2.3)]
)
def test_clear_attention_is_the_definition(config: Clear, text_first: bool, impl: str) -> None:
    grid, text_len = (5, 7), 3
    kernel = ClearAttention(config, num_heads=2, head_dim=4).double()
    kernel.impl = impl
    kernel.observe(grid)
    if config.pool_size is not None:
        torch.nn.init.uniform_(kernel.pool_weight)
    query, key, value = torch.randn(3, 2, 2, text_len + 35, 4, dtype=torch.float64)
    text_mask = torch.tensor([[True, True, False], [True, True, True]])
    out = kernel(query, key, value, Layout(grid, text_len, text_first, text_mask), scale=0.7)

    side = config.pool_size or cell_side(grid, config.pool_tokens or 1)
    weight = kernel.pool_weight if config.pool_size is not None else torch.full((side, side), 1 / side**2).double()
    image = slice(text_len, None) if text_first else slice(0, 35)
    pooled = [_pooled_by_hand(part[:, :, image], weight, grid) for part in (key, value)]
    num_cells = pooled[0].shape[2] if config != Clear(radius=2.3) else 0
    keys, values = (
        torch.cat([part, cells[:, :, :num_cells]], 2) for part, cells in zip((key, value), pooled, strict=True)
    )
    mask = _mask_by_hand(grid, config.radius, text_len, text_first, text_mask, num_cells)
    assert torch.allclose(out, scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.7))


def test_covers_is_the_exact_comparison() -> None:
    layout = Layout((4, 5), 3, True)  # the diagonal is 5 long
    assert not ClearAttention(Clear(radius=5), num_heads=1, head_dim=4).covers(layout)
    assert ClearAttention(Clear(radius=5.01), num_heads=1, head_dim=4).covers(layout)
    huge, wide = Clear(radius=1e200), Clear(radius=5.01)
    assert ClearAttention(huge, num_heads=1, head_dim=4).covers(layout)
    pairs = [ClearAttention.pairs(one, (4, 5), 3, num_heads=1, head_dim=4) for one in (huge, wide)]
    assert pairs == [23 * 23] * 2
    assert not ClearAttention(Clear(radius=50, pool_size=2), num_heads=1, head_dim=4).covers(layout)
    assert not ClearAttention(Clear(radius=50, pool_tokens=2), num_heads=1, head_dim=4).covers(layout)


def _pooled_by_hand(tokens: Tensor, weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """One cell after the other."""
    height, width = grid
    side = weight.shape[0]
    cells = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            held = [(y, x) for y in range(top, min(top + side, height)) for x in range(left, min(left + side, width))]
            weights = torch.stack([weight[y - top, x - left] for y, x in held])
            parts = tokens[:, :, [y * width + x for y, x in held]]  # [B, H, tokens of the cell, D]
            cells.append((parts * weights[:, None]).sum(2) * weight.sum() / weights.sum())
    return torch.stack(cells, dim=2)


def _mask_by_hand(
    grid: tuple[int, int], radius: float, text_len: int, text_first: bool, text_mask: Tensor, num_cells: int
) -> Tensor:
    """[B, 1, N, N + C] bool, entry by entry."""
    height, width = grid
    num_tokens = text_len + height * width
    start = text_len if text_first else 0
    mask = torch.zeros(len(text_mask), num_tokens, num_tokens + num_cells, dtype=torch.bool)

    def place(index: int) -> tuple[int, int] | None:
        return divmod(index - start, width) if start <= index < start + height * width else None

    for sample in range(len(text_mask)):
        for i in range(num_tokens):
            for j in range(num_tokens):
                row, col = place(i), place(j)
                if col is None:
                    mask[sample, i, j] = text_mask[sample, j if text_first else j - height * width]
                else:
                    mask[sample, i, j] = row is None or (row[0] - col[0]) ** 2 + (row[1] - col[1]) ** 2 < radius**2
            mask[sample, i, num_tokens:] = place(i) is not None
    return mask[:, None]
