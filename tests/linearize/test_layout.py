"""Grids from position ids, and text masks from key masks."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lineardit import Clear, linearize_
from lineardit.linearize import LayoutError
from lineardit.linearize.families.positions import image_and_references, rectangle
from lineardit.linearize.layout import Layout, text_mask_of
from tiny_models import build, inputs_of, position_ids, run

SIDES = st.integers(1, 40)


@given(height=SIDES, width=SIDES, offset=st.integers(0, 60))
def test_rectangle_reads_any_grid(height: int, width: int, offset: int) -> None:
    ids = position_ids((height, width), offset=offset)
    grid, exact = rectangle(ids)
    assert grid == (height, width)
    assert torch.equal(exact, ids)


@pytest.mark.parametrize("grid", [(512, 512), (257, 300), (300, 280), (1, 600), (600, 1), (2, 513)])
def test_rectangle_reads_bfloat16_ids_beyond_256(grid: tuple[int, int]) -> None:
    ids = position_ids(grid)
    grid_read, exact = rectangle(ids.to(torch.bfloat16))
    assert grid_read == grid
    assert exact.dtype == torch.float32
    assert torch.equal(exact, ids)


@given(height=st.integers(2, 12), width=st.integers(2, 12), data=st.data())
def test_rectangle_refuses_two_exchanged_tokens(height: int, width: int, data: st.DataObject) -> None:
    ids = position_ids((height, width))
    first, second = data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=2, max_size=2, unique=True))
    ids[[first, second]] = ids[[second, first]]
    with pytest.raises(LayoutError, match="rectangle"):
        rectangle(ids)


@given(height=st.integers(2, 12), width=st.integers(2, 12), data=st.data())
def test_rectangle_refuses_a_missing_token(height: int, width: int, data: st.DataObject) -> None:
    ids = position_ids((height, width))
    missing = data.draw(st.integers(1, len(ids) - 2))
    with pytest.raises(LayoutError, match="rectangle"):
        rectangle(torch.cat([ids[:missing], ids[missing + 1 :]]))


@pytest.mark.parametrize("text_first", [True, False])
def test_text_mask_of_extracts_the_text_part(text_first: bool) -> None:
    text = torch.tensor([[True, False, True], [False, True, True]])
    image = torch.ones(2, 6, dtype=torch.bool)
    mask = torch.cat([text, image] if text_first else [image, text], dim=1)
    query = torch.zeros(2, 4, 9, 8)
    for given_mask in (mask, mask[:, None, None], mask[:, None, None].expand(2, 4, 1, 9)):
        assert torch.equal(text_mask_of(given_mask, query, Layout((2, 3), 3, text_first)), text)
    single = text_mask_of(mask[:1, None, None], query, Layout((2, 3), 3, text_first))
    assert torch.equal(single, text[:1].expand(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocked", [-10000.0, -torch.inf])
def test_text_mask_of_reads_an_additive_mask(dtype: torch.dtype, blocked: float) -> None:
    text = torch.tensor([[True, False, True]])
    attend = torch.cat([text, torch.ones(1, 6, dtype=torch.bool)], dim=1)
    mask = torch.zeros(1, 9, dtype=dtype).masked_fill(~attend, blocked)
    assert torch.equal(text_mask_of(mask[:, None, None], torch.zeros(1, 4, 9, 8), Layout((2, 3), 3, True)), text)


def test_text_mask_of_refuses_a_query_by_key_mask() -> None:
    with pytest.raises(LayoutError, match="mask of keys"):
        text_mask_of(torch.ones(9, 9, dtype=torch.bool), torch.zeros(9, 1, 9, 4), Layout((2, 3), 3, True))


def test_layout_counts_image_tokens() -> None:
    assert Layout((2, 5, 7), 3, True).num_image_tokens == 70


class CountReads(TorchDispatchMode):
    """Counts values read from the device: each read waits for all queued work."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["qwen-image", "lumina2", "hunyuan-image"])
def test_device_synchronizations_do_not_grow_with_layers(family: str) -> None:
    counts = []
    for num_layers in (1, 3):
        model = build(family, num_layers=num_layers)
        linearize_(model, Clear(radius=1.5))
        with CountReads() as reads:
            run(model, inputs_of(family))
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


class OnDevice(torch.Tensor):
    """A tensor treated as if on a device: counts reads from it."""

    reads = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.reads += func.__name__ in ("cpu", "__int__", "__bool__", "equal")
        out = super().__torch_function__(func, types, args, kwargs)
        return out.as_subclass(torch.Tensor) if func.__name__ == "cpu" else out


def test_position_ids_are_read_from_the_device_once() -> None:
    image = position_ids((5, 7))
    reference = position_ids((3, 4)) + torch.tensor([1.0, 0.0, 0.0])
    both = torch.cat([image, reference])
    for read, ids in ((rectangle, image), (image_and_references, both)):
        OnDevice.reads = 0
        exact = read(ids.as_subclass(OnDevice))[-1]
        assert OnDevice.reads == 1 and torch.equal(exact, ids.float())
