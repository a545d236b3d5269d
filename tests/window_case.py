"""Cases of window attention: window, sizes, masks, layout and random tensors; and windows computed pair by pair."""

import itertools
import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from tolerance import assert_matches_reference
from torch import Tensor

from lineardit.kernels.window import Box, Circle, Window, windowed_attention, windowed_attention_reference

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
odd = st.integers(0, 3).map(lambda half: 2 * half + 1)
any_boxes = st.builds(
    Box,
    window=st.tuples(odd, odd),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    cell=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    frame_radius=st.none() | st.integers(1, 3),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """The window is a circle of this radius, or the box."""

    grid: tuple[int, ...]
    radius: float = 0
    frame_radius: int | None = None
    box: Box | None = None
    text_len: int = 0
    text_first: bool = True
    num_pooled: int = 0
    masked: bool = False
    batch: int = 1
    num_heads: int = 2
    head_dim: int = 8
    contiguous: bool = True

    def __str__(self) -> str:
        grid = "x".join(str(size) for size in self.grid)
        window = f"r{self.radius}" if self.box is None else f"w{self.box.window}-d{self.box.dilation}-c{self.box.cell}"
        reach = self.window.frame_radius
        extras = [f"frames{reach}"] * (reach is not None) + [f"pooled{self.num_pooled}"] * bool(self.num_pooled)
        extras += ["masked"] * self.masked + ["textlast"] * (not self.text_first) + ["strided"] * (not self.contiguous)
        return "-".join([f"B{self.batch}-H{self.num_heads}-grid{grid}-{window}-text{self.text_len}", *extras])

    @property
    def window(self) -> Window:
        return self.box or Circle(radius=self.radius, frame_radius=self.frame_radius)

    @property
    def num_tokens(self) -> int:
        return self.text_len + math.prod(self.grid)

    @property
    def image(self) -> slice:
        """The positions of the image's tokens."""
        start = self.text_len if self.text_first else 0
        return slice(start, start + math.prod(self.grid))

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Query, key, value and, where there are any, pooled key and value."""
        shape = (self.batch, self.num_heads, self.num_tokens, self.head_dim)
        if self.contiguous:
            tensors = list(torch.randn(3, *shape, dtype=dtype))
        else:  # as a fused projection returns them
            fused = torch.randn(self.batch, self.num_tokens, 3, self.num_heads, self.head_dim, dtype=dtype)
            tensors = list(fused.permute(2, 0, 3, 1, 4))
        if self.num_pooled:
            tensors += torch.randn(2, self.batch, self.num_heads, self.num_pooled, self.head_dim, dtype=dtype)
        return tensors

    def text_mask(self) -> Tensor | None:
        """The last sample's text is masked completely, the others' in part."""
        if not self.masked:
            return None
        mask = torch.arange(self.text_len).repeat(self.batch, 1) % 3 > 0
        mask[-1] = False
        return mask

    def run(self, *tensors: Tensor, attention=windowed_attention, **options) -> Tensor:
        return attention(
            *tensors[:3],
            grid=self.grid,
            window=self.window,
            text_len=self.text_len,
            text_first=self.text_first,
            text_mask=self.text_mask(),
            pooled=tensors[3:] or None,
            **options,
        )

    def reference(self, *tensors: Tensor, **options) -> Tensor:
        return self.run(*tensors, attention=windowed_attention_reference, **options)

    def matches_reference(self, dtype: torch.dtype, **options) -> None:
        """Compare outputs and all gradients."""
        assert_matches_reference(lambda *tensors: self.run(*tensors, **options), self.reference, self.tensors(), dtype)


def pairs_by_hand(grid: tuple[int, ...], window: Window) -> Tensor:
    """[image tokens, image tokens] bool, by the definition: whether the first sees the second."""
    frames, *sides = (1, *grid)[-3:]
    if isinstance(window, Box):
        along = zip(sides, window.window, window.dilation, window.cell, strict=True)
        rows, columns = ([_seen(position, size, *rest) for position in range(size)] for size, *rest in along)

    def sees(query: tuple[int, ...], key: tuple[int, ...]) -> bool:
        if window.frame_radius is not None and abs(query[0] - key[0]) >= window.frame_radius:
            return False
        if isinstance(window, Box):
            return key[1] in rows[query[1]] and key[2] in columns[query[2]]
        return (query[1] - key[1]) ** 2 + (query[2] - key[2]) ** 2 < window.radius * window.radius

    positions = list(itertools.product(range(frames), range(sides[0]), range(sides[1])))
    return torch.tensor([[sees(query, key) for key in positions] for query in positions])


def _seen(position: int, size: int, window: int, dilation: int, cell: int) -> set[int]:
    """The positions on an axis that a position sees under a box."""
    peers = [other for other in range(size) if other % dilation == position % dilation]
    cells = [set(peers[start : start + cell]) for start in range(0, len(peers), cell)]
    own_cell = next(index for index, members in enumerate(cells) if position in members)
    first = own_cell - window // 2
    while first + window > len(cells):  # shifted inward; on a short axis, from the front
        first -= 1
    first = max(first, 0)
    return set().union(*cells[first : first + window])
