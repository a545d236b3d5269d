"""The reference against the definition, written as loops over tokens."""

import math

import pytest
import torch
from torch import Tensor

from lineardit.kernels.window import window_attention_reference


def brute_force(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: tuple[int, ...],
    radius: float,
    text_len: int,
    text_first: bool,
    text_mask: Tensor | None,
    pooled: tuple[Tensor, Tensor] | None,
    scale: float,
) -> Tensor:
    frames, height, width = (1, *grid)[-3:]
    image_len = frames * height * width
    start = text_len if text_first else 0

    def place(token: int) -> tuple[int, int] | None:
        """(row, column), None for text."""
        image = token - start
        return divmod(image % (height * width), width) if 0 <= image < image_len else None

    def attends(sample: int, token: int, other: int) -> bool:
        here, there = place(token), place(other)
        if there is None:
            return text_mask is None or bool(text_mask[sample, other - (0 if text_first else image_len)])
        return here is None or (here[0] - there[0]) ** 2 + (here[1] - there[1]) ** 2 < radius * radius

    out = torch.zeros_like(query)
    for sample, head, token in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        row = query[sample, head, token]
        seen = [other for other in range(query.shape[2]) if attends(sample, token, other)]
        pairs = [(key[sample, head, other], value[sample, head, other]) for other in seen]
        if pooled is not None and place(token) is not None:
            pairs += zip(pooled[0][sample, head], pooled[1][sample, head], strict=True)
        weights = [math.exp(scale * float(row @ one_key)) for one_key, _ in pairs]
        for weight, (_, one_value) in zip(weights, pairs, strict=True):
            out[sample, head, token] += weight / sum(weights) * one_value
    return out


@pytest.mark.parametrize("grid", [(3, 5), (2, 2, 3)], ids=["grid3x5", "frames2x2x3"])
@pytest.mark.parametrize("text_len, text_first", [(0, True), (3, True), (3, False)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_pooled", [0, 2])
def test_window_attention_reference_equals_loops(grid, text_len, text_first, masked, num_pooled):
    num_tokens = text_len + math.prod(grid)
    query, key, value = torch.randn(3, 2, 2, num_tokens, 4, dtype=torch.float64)
    pooled = tuple(torch.randn(2, 2, 2, num_pooled, 4, dtype=torch.float64)) if num_pooled else None
    text_mask = torch.tensor([[True, False, True], [False, False, False]])[:, :text_len] if masked else None
    options = {
        "grid": grid,
        "radius": 1.5,
        "text_len": text_len,
        "text_first": text_first,
        "text_mask": text_mask,
        "pooled": pooled,
        "scale": 0.7,
    }
    out = window_attention_reference(query, key, value, **options)
    torch.testing.assert_close(out, brute_force(query, key, value, **options), rtol=1e-12, atol=1e-12)


def test_window_attention_reference_scales_by_the_head_dimension():
    query, key, value = torch.randn(3, 1, 1, 6, 4, dtype=torch.float64)
    out = window_attention_reference(query, key, value, grid=(2, 3), radius=9)
    expected = ((query @ key.mT) / 2).softmax(-1) @ value
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_window_attention_reference_refuses_a_mask_beyond_2_to_31_entries():
    query = torch.empty(1, 1, 46341, 1, device="meta")  # 46341**2 > 2**31
    with pytest.raises(ValueError, match=r"at most 2\*\*31 entries, got 2147488281"):
        window_attention_reference(query, query, query, grid=(1, 46341), radius=2)
