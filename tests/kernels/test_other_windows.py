"""Boxes as windows: the rule against loops, the lists against the rule, all implementations against the reference."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_matches_reference
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from impls import ALL, PORTABLE
from lineardit.kernels.window import (
    Box,
    Circle,
    Window,
    choose_impl,
    operator,
    window_attention,
    windowed_attention,
    windowed_attention_reference,
)
from lineardit.kernels.window.kept_bias import window_bias_op
from lineardit.kernels.window.lists import TileLists, box_lists, window_lists
from lineardit.kernels.window.reference import window_mask
from lineardit.kernels.window.tiled import window_groups

CPU = torch.device("cpu")
BOXES = [
    Box(window=(3, 3)),
    Box(window=(1, 5)),
    Box(window=(99, 3)),
    Box(window=(3, 3), dilation=(2, 3)),
    Box(window=(5, 1), dilation=(3, 7)),
    Box(window=(3, 3), cell=(2, 2)),
    Box(window=(1, 3), cell=(4, 3)),
    Box(window=(3, 3), dilation=(1, 2), cell=(2, 2)),
]
on_boxes = pytest.mark.parametrize("box", BOXES, ids=lambda box: f"w{box.window}-d{box.dilation}-c{box.cell}")


def seen(place: int, size: int, window: int, dilation: int, cell: int) -> set[int]:
    """What a place sees of its axis, by the definition."""
    fellows = [other for other in range(size) if other % dilation == place % dilation]
    cells = [set(fellows[start : start + cell]) for start in range(0, len(fellows), cell)]
    own = next(index for index, members in enumerate(cells) if place in members)
    first = own - window // 2
    while first + window > len(cells):  # slides inside, and stays at the front of a short axis
        first -= 1
    first = max(first, 0)
    return set().union(*cells[first : first + window])


def pairs_by_hand(grid: tuple[int, ...], box: Box) -> Tensor:
    """[tokens, tokens] bool."""
    frames, *sides = (1, *grid)[-3:]
    settings_of = zip(sides, box.window, box.dilation, box.cell, strict=True)
    rows, columns = ([seen(place, size, *rest) for place in range(size)] for size, *rest in settings_of)
    places = list(itertools.product(range(frames), range(sides[0]), range(sides[1])))

    def attends(here: tuple[int, ...], there: tuple[int, ...]) -> bool:
        near_in_time = box.frame_radius is None or abs(here[0] - there[0]) < box.frame_radius
        return near_in_time and there[1] in rows[here[1]] and there[2] in columns[here[2]]

    return torch.tensor([[attends(here, there) for there in places] for here in places])


def listed_pairs(lists: TileLists, num_tokens: int) -> Tensor:
    """How often the lists name every pair, [tokens, tokens]."""
    pairs = torch.zeros(num_tokens, num_tokens, dtype=torch.int)
    for tile, count in enumerate(lists.counts.tolist()):
        for key_tile, mask_id in zip(lists.key_tiles[tile, :count], lists.mask_ids[tile, :count], strict=True):
            query, key = lists.masks[mask_id].nonzero().unbind(1)
            index = (lists.query_tokens[tile, query], lists.key_tokens[key_tile, key])
            pairs.index_put_(index, torch.ones((), dtype=torch.int), accumulate=True)
    return pairs


@on_boxes
@pytest.mark.parametrize("grid", [(5, 7), (4, 9), (1, 6), (7, 2), (3, 3, 4)], ids=str)
def test_window_mask_of_a_box_equals_loops(box: Box, grid: tuple[int, ...]) -> None:
    assert torch.equal(window_mask(grid, box, 0, True, CPU), pairs_by_hand(grid, box))


@pytest.mark.parametrize("frame_radius", [1, 2, 9])
def test_window_mask_of_a_box_ends_in_time(frame_radius: int) -> None:
    grid, box = (4, 3, 5), Box(window=(3, 3), dilation=(1, 2), frame_radius=frame_radius)
    assert torch.equal(window_mask(grid, box, 0, True, CPU), pairs_by_hand(grid, box))


@pytest.mark.parametrize("grid", [(5, 7), (8, 5), (12, 6)], ids=str)
def test_boxes_give_every_query_as_many_keys(grid: tuple[int, int]) -> None:
    assert (window_mask(grid, Box(window=(5, 3)), 0, True, CPU).sum(1) == 15).all()
    dilated = window_mask((grid[0], 6), Box(window=(1, 3), dilation=(1, 2)), 0, True, CPU)
    assert (dilated.sum(1) == 3).all()
    places = torch.arange(6).repeat(grid[0])
    assert not (dilated & ((places[:, None] - places) % 2 == 1)).any()


sizes = st.integers(1, 11)
sides = st.integers(1, 5)
pair = st.tuples(sides, sides)
odd = st.integers(0, 3).map(lambda half: 2 * half + 1)
boxes = st.builds(
    Box,
    window=st.tuples(odd, odd),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    cell=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    frame_radius=st.none() | st.integers(1, 3),
)


@settings(max_examples=15)
@given(
    grid=st.tuples(st.integers(1, 3), sizes, sizes), box=boxes, query_tile=pair, key_tile=pair, by_class=st.booleans()
)
def test_box_lists_name_each_pair_of_the_window_once(grid, box, query_tile, key_tile, by_class):
    step = box.dilation if by_class else (1, 1)
    lists = box_lists(grid, box, query_tile=query_tile, key_tile=key_tile, step=step)
    expected = window_mask(grid, box, 0, True, CPU)
    assert torch.equal(listed_pairs(lists, math.prod(grid)), expected.int())
    for tile, count in enumerate(lists.counts.tolist()):
        masks = lists.masks[lists.mask_ids[tile, :count]]
        whole = masks[:, masks.any(2).any(0)].flatten(1).all(1)
        assert whole.tolist() == [entry < lists.inside[tile] for entry in range(count)]


@settings(max_examples=15)
@given(grid=st.tuples(sizes, sizes), box=boxes.filter(lambda box: box.frame_radius is None))
def test_span_counts_the_pairs_and_covers_tells_when_they_are_all(grid, box):
    pairs = window_mask(grid, box, 0, True, CPU)
    assert box.span(0, grid[0]).num_pairs() * box.span(1, grid[1]).num_pairs() == pairs.sum()
    assert box.covers(*grid) == pairs.all()


def test_window_groups_of_whole_cells_need_no_mask() -> None:
    for cell in ((8, 8), (32, 24), (6, 5)):
        grid = (2, 6 * cell[0], 5 * cell[1])
        (group,) = window_groups(grid, Box(window=(3, 3), cell=cell), CPU)
        assert group.mask is None
        assert len(group.queries) * group.queries.shape[1] == math.prod(grid)
        assert group.keys.shape[1] % (cell[0] * cell[1]) == 0
    lists = window_lists((48, 64), Box(window=(3, 3), cell=(8, 16)), query_tile=(8, 16), key_tile=(8, 8))
    assert (lists.inside == 18).all() and (lists.counts == 18).all()


def test_window_groups_of_a_dilated_box_gather_its_class_alone() -> None:
    for group in window_groups((45, 50), Box(window=(5, 5), dilation=(4, 3)), CPU):
        rows, columns = group.queries // 50, group.queries % 50
        key_rows, key_columns = group.keys // 50, group.keys % 50
        assert (rows % 4 == key_rows[:, :1] % 4).all() and (key_rows % 4 == key_rows[:, :1] % 4).all()
        assert (columns % 3 == key_columns[:, :1] % 3).all() and (key_columns % 3 == key_columns[:, :1] % 3).all()
        assert group.keys.shape[1] <= 12 * 12


def matches_reference(grid: tuple[int, ...], window: Window, impl: str, text_len: int, **shape: int) -> None:
    """Outputs and all gradients, with part of the text masked and pooled keys beside it."""
    sizes_of = {"batch": 1, "heads": 1, "head_dim": 8, "pooled": 0} | shape
    batch, heads, head_dim, num_pooled = sizes_of.values()
    lengths = [text_len + math.prod(grid)] * 3 + [num_pooled] * 2 * bool(num_pooled)
    inputs = [torch.randn(batch, heads, length, head_dim, dtype=torch.float64) for length in lengths]
    text_mask = torch.arange(text_len).repeat(batch, 1) % 3 > 0 if text_len else None
    options = {"grid": grid, "window": window, "text_len": text_len, "text_mask": text_mask, "text_first": batch == 1}
    assert_matches_reference(
        lambda *tensors: windowed_attention(*tensors[:3], **options, pooled=tensors[3:] or None, impl=impl),
        lambda *tensors: windowed_attention_reference(*tensors[:3], **options, pooled=tensors[3:] or None),
        inputs,
        torch.float32,
    )


@on_boxes
@pytest.mark.parametrize("text_len", [0, 5])
@pytest.mark.parametrize("impl", PORTABLE)
def test_windowed_attention_matches_reference(impl: str, text_len: int, box: Box) -> None:
    matches_reference((7, 10), box, impl, text_len, batch=2 if text_len else 1)


@pytest.mark.parametrize("text_len", [0, 5])
@pytest.mark.parametrize(
    ("grid", "box"),
    [
        ((3, 11), Box(window=(3, 3))),
        ((9, 5), Box(window=(3, 3), dilation=(2, 3))),
        ((9, 17), Box(window=(1, 1), cell=(8, 8))),  # tiles without a mask, and ragged ones
        ((2, 3, 5), Box(window=(1, 3), frame_radius=1)),
    ],
    ids=str,
)
def test_windowed_attention_triton_matches_reference(grid: tuple[int, ...], box: Box, text_len: int) -> None:
    if "triton" not in ALL:
        pytest.skip("triton is not installed")
    matches_reference(grid, box, "triton", text_len, head_dim=16)


@settings(max_examples=10)
@given(
    grid=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)),
    box=boxes,
    text_len=st.integers(0, 4),
    pooled=st.integers(0, 2),
    impl=st.sampled_from(["masked", "tiled", "auto"]),
)
def test_windowed_attention_matches_reference_anywhere(grid, box, text_len, pooled, impl):
    matches_reference(grid, box, impl, text_len, pooled=pooled, heads=2)


@pytest.mark.parametrize("impl", PORTABLE)
def test_windowed_attention_in_a_circle_is_window_attention(impl: str) -> None:
    query = torch.randn(1, 2, 4 + 60, 8)
    options = {"grid": (6, 10), "text_len": 4, "impl": impl}
    expected = window_attention(query, query, query, radius=2.5, **options)
    assert torch.equal(windowed_attention(query, query, query, window=Circle(radius=2.5), **options), expected)


@pytest.mark.parametrize(
    ("grid", "box", "expected"),
    [
        ((24, 24), Box(window=(3, 3)), "masked"),
        ((25, 24), Box(window=(3, 3)), "tiled"),
        ((32, 32), Box(window=(25, 25)), "masked"),
        ((32, 32), Box(window=(25, 25), dilation=(2, 2)), "tiled"),
        ((32, 32), Box(window=(3, 3), cell=(8, 8)), "masked"),
        ((64, 64), Box(window=(3, 3), cell=(8, 8)), "tiled"),
        ((8, 16, 16), Box(window=(15, 15)), "masked"),
        ((8, 16, 16), Box(window=(15, 15), frame_radius=1), "tiled"),
        ((65, 64), Box(window=(99, 99)), "tiled"),
    ],
    ids=str,
)
def test_choose_impl_counts_what_tiles_read_of_a_box(grid: tuple[int, ...], box: Box, expected: str) -> None:
    assert choose_impl(torch.empty(1, 1, 1, 1), grid=grid, window=box, text_len=0) == expected


@pytest.mark.parametrize("impl", PORTABLE)
def test_windowed_attention_compiles_once_for_all_grids(impl: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    box = Box(window=(3, 5), dilation=(2, 1), cell=(1, 2))

    def attend(query: Tensor, grid: Tensor) -> Tensor:
        return windowed_attention(query, query, query, grid=tuple(grid.shape), window=box, text_len=4, impl=impl)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for expected_graphs, grid in [(1, (5, 8)), (2, (7, 6)), (2, (9, 3)), (2, (4, 11))]:
        query = torch.randn(1, 1, 4 + math.prod(grid), 4, requires_grad=True)
        results = [function(query, torch.empty(grid, device="meta")) for function in (attend, compiled)]
        grads = [torch.autograd.grad(out.square().sum(), query)[0] for out in results]
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(grads[1], grads[0])
        assert counter.frame_count == expected_graphs


def test_operators_with_a_box_pass_opcheck() -> None:
    image = [torch.randn(1, 1, 15, 4, requires_grad=True) for _ in range(3)]
    text = [torch.randn(1, 1, 3, 4, requires_grad=True) for _ in range(3)]
    window = (None, [3, 1, 1, 2, 1, 1])
    arguments = (text[0], True, *image, *text[1:], None, (3, 5), None, 0.5, "tiled", *window)
    torch.library.opcheck(operator.window_attention_op, arguments)
    torch.library.opcheck(window_bias_op, (torch.zeros(1), (3, 5), None, 4, True, *window))


@pytest.mark.parametrize(
    ("settings_of", "message"),
    [
        ({"window": (4, 3)}, r"window must be odd along both axes, got \(4, 3\)"),
        ({"window": 3}, "window must be .along the height, along the width., integers >= 1, got 3"),
        ({"window": (3, 3, 3)}, "window must be .along the height"),
        ({"window": (3, 3.0)}, "window must be .along the height"),
        ({"window": (3, 3), "dilation": (0, 1)}, r"dilation must be .*, got \(0, 1\)"),
        ({"window": (3, 3), "cell": (True, 1)}, r"cell must be .*, got \(True, 1\)"),
        ({"window": (3, 3), "frame_radius": 0}, "frame_radius must be an integer >= 1 or None, got 0"),
    ],
)
def test_box_says_what_is_wrong(settings_of: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Box(**settings_of)


def test_windowed_attention_says_what_is_wrong() -> None:
    query = torch.zeros(1, 1, 8, 4)
    with pytest.raises(ValueError, match=r"window must be a Circle or a Box, got \(3, 3\)"):
        windowed_attention(query, query, query, grid=(2, 4), window=(3, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"frame_radius=1 needs grid = \(frames, height, width\)"):
        windowed_attention(query, query, query, grid=(2, 4), window=Box(window=(3, 3), frame_radius=1))
