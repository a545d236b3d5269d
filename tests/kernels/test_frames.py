"""Window attention over several frames, each near its neighbours in time: frame_radius."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_matches_reference
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from window_case import Case

from impls import ALL, PORTABLE
from lineardit.kernels.window import Circle, choose_impl, operator, window_attention, window_attention_reference
from lineardit.kernels.window.kept_bias import window_bias_op
from lineardit.kernels.window.lists import circle_lists
from lineardit.kernels.window.reference import window_mask
from lineardit.kernels.window.tiled import tile_groups

RADII = pytest.mark.parametrize("frame_radius", [1, 2, None])
TEXT = pytest.mark.parametrize("text_len", [0, 5])


def sees(frame_radius: int | None, frame: int, other: int) -> bool:
    return frame_radius is None or abs(frame - other) < frame_radius


def matches_reference(case: Case, frame_radius: int | None, impl: str, dtype: torch.dtype = torch.float32) -> None:
    assert_matches_reference(
        lambda *tensors: case.run(window_attention, *tensors, frame_radius=frame_radius, impl=impl),
        lambda *tensors: case.run(window_attention_reference, *tensors, frame_radius=frame_radius),
        case.tensors(),
        dtype,
    )


@RADII
@TEXT
@pytest.mark.parametrize("text_first", [True, False])
def test_window_attention_reference_with_frames_equals_loops(
    frame_radius: int | None, text_len: int, text_first: bool
) -> None:
    frames, height, width = grid = (4, 3, 5)
    case = Case(grid=grid, radius=1.5, text_len=text_len, text_first=text_first, num_heads=1, head_dim=3)
    query, key, value = case.tensors()
    start = text_len if text_first else 0

    def place(token: int) -> tuple[int, int, int] | None:
        """(frame, row, column), None for text."""
        frame, rest = divmod(token - start, height * width)
        return (frame, *divmod(rest, width)) if 0 <= frame < frames else None

    def attends(here: tuple[int, int, int] | None, there: tuple[int, int, int] | None) -> bool:
        if here is None or there is None:
            return True
        near = (here[1] - there[1]) ** 2 + (here[2] - there[2]) ** 2 < 1.5**2
        return near and sees(frame_radius, here[0], there[0])

    expected = torch.empty_like(query)
    for token in range(case.num_tokens):
        seen = [other for other in range(case.num_tokens) if attends(place(token), place(other))]
        weights = [math.exp(0.7 * float(query[0, 0, token] @ key[0, 0, other])) for other in seen]
        parts = [weight * value[0, 0, other] for weight, other in zip(weights, seen, strict=True)]
        expected[0, 0, token] = sum(parts) / sum(weights)
    out = case.run(window_attention_reference, query, key, value, frame_radius=frame_radius, scale=0.7)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@RADII
@TEXT
@pytest.mark.parametrize("impl", ALL)
def test_window_attention_with_frames_matches_reference(impl: str, text_len: int, frame_radius: int | None) -> None:
    grid = (3, 2, 4) if impl == "triton" else (3, 5, 9)  # a tile for each frame, and several
    case = Case(grid=grid, radius=2.5, text_len=text_len, num_heads=1, head_dim=16)
    matches_reference(case, frame_radius, impl)


@settings(max_examples=10)
@given(
    case=st.builds(
        Case,
        grid=st.tuples(st.integers(1, 5), st.integers(1, 12), st.integers(1, 12)),
        radius=st.floats(0.5, 12),
        text_len=st.integers(1, 5),
        text_first=st.booleans(),
        masked=st.booleans(),
        num_pooled=st.integers(0, 3),
        batch=st.integers(1, 2),
    ),
    frame_radius=st.integers(1, 6),
    impl=st.sampled_from(["masked", "tiled", "auto"]),
)
def test_window_attention_with_frames_matches_reference_anywhere(case: Case, frame_radius: int, impl: str) -> None:
    matches_reference(case, frame_radius, impl)


@pytest.mark.parametrize("impl", PORTABLE)
def test_window_attention_changes_in_the_frames_that_see_a_token(impl: str) -> None:
    case = Case(grid=(5, 4, 9), radius=3, text_len=2)
    query, key, value = case.tensors()
    out = case.run(window_attention, query, key, value, frame_radius=2, impl=impl)
    moved = value.clone()
    moved[:, :, 2 + 36] += 1  # the first token of frame 1
    changed = (case.run(window_attention, query, key, moved, frame_radius=2, impl=impl) != out).any(3)[0, 0]
    assert changed[:2].all()
    per_frame = changed[2:].unflatten(0, (5, 36))
    near = torch.tensor([row**2 + column**2 < 9 for row in range(4) for column in range(9)])
    for frame, seen in enumerate([True, True, True, False, False]):
        assert torch.equal(per_frame[frame], near & seen)


@RADII
@pytest.mark.parametrize("impl", PORTABLE)
def test_window_attention_of_one_frame_is_that_of_an_image(impl: str, frame_radius: int | None) -> None:
    image, frame = Case(grid=(5, 9), radius=3, text_len=2), Case(grid=(1, 5, 9), radius=3, text_len=2)
    tensors = image.tensors()
    expected = image.run(window_attention, *tensors, impl=impl)
    assert torch.equal(frame.run(window_attention, *tensors, frame_radius=frame_radius, impl=impl), expected)


@settings(max_examples=15)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7)),
    radius=st.floats(0.1, 9),
    frame_radius=st.integers(1, 6),
    tile=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_tile_groups_hold_the_pairs_of_near_frames(
    grid: tuple[int, int, int], radius: float, frame_radius: int, tile: tuple[int, int]
) -> None:
    lists = circle_lists(grid, radius, frame_radius, query_tile=tile, key_tile=tile)
    pairs = torch.zeros(math.prod(grid), math.prod(grid), dtype=torch.int)
    for group in tile_groups(lists, torch.device("cpu")):
        mask = group.mask
        if mask is None:
            mask = torch.ones(group.queries.shape[1], group.keys.shape[1], dtype=torch.bool)
        for queries, keys in zip(group.queries, group.keys, strict=True):
            pairs[queries[:, None], keys] += mask.int()
    window = Circle(radius=radius, frame_radius=frame_radius)
    assert torch.equal(pairs, window_mask(grid, window, 0, True, torch.device("cpu")).int())


@pytest.mark.parametrize(("frame_radius", "frames_read"), [(1, [1, 1, 1, 1]), (2, [2, 3, 3, 2]), (9, [4, 4, 4, 4])])
def test_circle_lists_read_no_tile_of_a_frame_out_of_reach(frame_radius: int, frames_read: list[int]) -> None:
    tiles = {"query_tile": (4, 8), "key_tile": (4, 4)}
    image = circle_lists((11, 13), 3, **tiles)
    lists = circle_lists((4, 11, 13), 3, frame_radius, **tiles)
    times = torch.tensor(frames_read)[:, None]
    assert torch.equal(lists.counts.unflatten(0, (4, -1)), times * image.counts)
    assert torch.equal(lists.inside.unflatten(0, (4, -1)), times * image.inside)
    assert torch.equal((lists.mask_ids >= 0).sum(1), lists.counts)
    assert torch.equal(lists.masks, image.masks)


@pytest.mark.parametrize(
    ("grid", "frame_radius", "expected"),
    [
        ((8, 16, 16), None, "masked"),
        ((8, 16, 16), 8, "masked"),
        ((8, 16, 16), 1, "tiled"),
        ((8, 16, 16), 2, "tiled"),
        ((3, 16, 16), 1, "tiled"),
        ((3, 16, 16), 3, "masked"),
        ((2, 16, 16), 1, "masked"),
        ((16, 4, 4), 1, "masked"),
    ],
)
def test_choose_impl_counts_the_frames_in_reach(grid: tuple[int, ...], frame_radius: int | None, expected: str) -> None:
    query = torch.empty(1, 1, 1, 1)
    window = Circle(radius=16, frame_radius=frame_radius)
    assert choose_impl(query, grid=grid, window=window, text_len=0) == expected


@pytest.mark.parametrize("impl", ["masked", "tiled"])
def test_window_attention_with_frames_compiles_once_for_all_grids(impl: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def attend(query: Tensor, grid: Tensor) -> Tensor:
        return window_attention(
            query, query, query, grid=tuple(grid.shape), radius=3, frame_radius=2, text_len=4, impl=impl
        )

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for expected_graphs, grid in [(1, (3, 5, 8)), (2, (4, 7, 6)), (2, (2, 9, 3)), (2, (5, 4, 11))]:
        query = torch.randn(1, 1, 4 + math.prod(grid), 4, requires_grad=True)
        results = [function(query, torch.empty(grid, device="meta")) for function in (attend, compiled)]
        grads = [torch.autograd.grad(out.square().sum(), query)[0] for out in results]
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(grads[1], grads[0])
        assert counter.frame_count == expected_graphs


def test_window_attention_op_with_frames_passes_opcheck() -> None:
    case = Case(grid=(2, 2, 3), radius=2, num_heads=1, head_dim=16)
    image = [tensor.requires_grad_() for tensor in case.tensors(torch.float32)]
    text = [torch.randn(1, 1, 3, 16, requires_grad=True) for _ in range(3)]
    arguments = (text[0], True, *image, *text[1:], None, case.grid, 2.0, 0.5, "tiled", 1)
    torch.library.opcheck(operator.window_attention_op, arguments)


def test_window_bias_op_with_frames_passes_opcheck() -> None:
    torch.library.opcheck(window_bias_op, (torch.zeros(1), (2, 3, 5), 2.0, 4, True, 1))


@pytest.mark.parametrize(
    ("grid", "frame_radius", "message"),
    [
        ((2, 1, 4), 0, "frame_radius must be an integer >= 1 or None, got 0"),
        ((2, 1, 4), 1.0, "frame_radius must be an integer >= 1 or None, got 1.0"),
        ((2, 1, 4), True, "frame_radius must be an integer >= 1 or None, got True"),
        ((2, 1, 5), 1, r"text_len \+ frames \* height \* width must equal N, got 0 \+ 2 \* 1 \* 5 != 8"),
        ((2, 4), 1, r"frame_radius=1 needs grid = \(frames, height, width\), got \(2, 4\)"),
    ],
)
def test_window_attention_says_what_is_wrong_with_frames(
    grid: tuple[int, ...], frame_radius: object, message: str
) -> None:
    tensor = torch.zeros(1, 1, 8, 4)
    with pytest.raises(ValueError, match=message):
        window_attention(tensor, tensor, tensor, grid=grid, radius=2, frame_radius=frame_radius)  # type: ignore[arg-type]
