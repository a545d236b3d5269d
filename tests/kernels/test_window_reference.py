"""The reference against the definition, written as loops over tokens."""

import math

import pytest
import torch
from torch import Tensor
from window_case import BOXES, Case, pairs_by_hand

from lineardit.kernels.window import Box, Circle, Window, window_attention_reference
from lineardit.kernels.window.reference import window_mask

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "window",
    [
        *BOXES,
        Circle(radius=2.3),
        *(Circle(radius=1.5, frame_radius=frame_radius) for frame_radius in (1, 2, 9)),
        *(Box(window=(3, 3), dilation=(1, 2), frame_radius=frame_radius) for frame_radius in (1, 2, 9)),
    ],
    ids=str,
)
@pytest.mark.parametrize("grid", [(5, 7), (4, 9), (1, 6), (7, 2), (3, 3, 4)], ids=str)
def test_window_mask_equals_loops(window: Window, grid: tuple[int, ...]) -> None:
    assert torch.equal(window_mask(grid, window, 0, True, CPU), pairs_by_hand(grid, window))


def loops(case: Case, query: Tensor, key: Tensor, value: Tensor, *pooled: Tensor, scale: float) -> Tensor:
    in_window, text_mask, image = pairs_by_hand(case.grid, case.window), case.text_mask(), case.image

    def attends(sample: int, token: int, other: int) -> bool:
        if not image.start <= other < image.stop:
            return text_mask is None or bool(text_mask[sample, other - (0 if case.text_first else len(in_window))])
        return not image.start <= token < image.stop or bool(in_window[token - image.start, other - image.start])

    out = torch.zeros_like(query)
    for sample, head, token in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        row = query[sample, head, token]
        seen = [other for other in range(query.shape[2]) if attends(sample, token, other)]
        pairs = [(key[sample, head, other], value[sample, head, other]) for other in seen]
        if pooled and image.start <= token < image.stop:
            pairs += zip(pooled[0][sample, head], pooled[1][sample, head], strict=True)
        weights = [math.exp(scale * float(row @ one_key)) for one_key, _ in pairs]
        for weight, (_, one_value) in zip(weights, pairs, strict=True):
            out[sample, head, token] += weight / sum(weights) * one_value
    return out


@pytest.mark.parametrize(
    "window",
    [
        {"grid": (3, 5), "radius": 1.5},
        {"grid": (2, 2, 3), "radius": 1.5},
        {"grid": (3, 2, 3), "radius": 1.5, "frame_radius": 2},
        {"grid": (3, 5), "box": Box(window=(1, 3))},
    ],
    ids=["circle", "all-frames", "near-frames", "box"],
)
@pytest.mark.parametrize("text_len, text_first", [(0, True), (3, True), (3, False)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_pooled", [0, 2])
def test_windowed_attention_reference_equals_loops(window, text_len, text_first, masked, num_pooled):
    text = {"text_len": text_len, "text_first": text_first, "masked": masked}
    case = Case(**window, **text, num_pooled=num_pooled, batch=2, num_heads=1, head_dim=4)
    tensors = case.tensors()
    out = case.reference(*tensors, scale=0.7)
    torch.testing.assert_close(out, loops(case, *tensors, scale=0.7), rtol=1e-12, atol=1e-12)


def test_window_attention_reference_matches_a_circle_and_the_default_scale():
    case = Case(grid=(3, 2, 3), radius=1.5, frame_radius=2, text_len=3, text_first=False, masked=True, num_pooled=2)
    query, key, value, *pooled = case.tensors()
    options = {"grid": case.grid, "radius": 1.5, "frame_radius": 2, "text_len": 3, "text_first": False}
    options |= {"text_mask": case.text_mask(), "pooled": pooled}
    out = window_attention_reference(query, key, value, **options)
    assert torch.equal(out, case.reference(query, key, value, *pooled))
    out = window_attention_reference(query, key, value, grid=(3, 7), radius=9)
    torch.testing.assert_close(out, (query @ key.mT / 8**0.5).softmax(-1) @ value, rtol=1e-12, atol=1e-12)


def test_window_attention_reference_refuses_a_mask_beyond_2_to_31_entries():
    query = torch.empty(1, 1, 46341, 1, device="meta")  # 46341**2 > 2**31
    with pytest.raises(ValueError, match=r"at most 2\*\*31 entries, got 2147488281"):
        window_attention_reference(query, query, query, grid=(1, 46341), radius=2)
