"""A kernel that runs the base's attention in one module and records where a sample of its queries attends.

    p_ij = softmax_j(scale * q_i . k_j),   i a sampled image query, j any key
    mass_r    sum of p_ij over image keys with |pos_i - pos_j| < r         distance    sum of p_ij |pos_i - pos_j|
    text      sum of p_ij over text keys                                               over image keys / their mass
    error_r   |out_r - out|^2 / |out|^2, out_r with softmax over text and the keys nearer than r, as `Clear` has it
    error_m   the same with out_m, the output of a method's kernel for the layer's queries, keys and values

B batch, H heads, N tokens, D head dimension, R radii, M methods, S sampled queries.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from ...kernels.pieces.cells import sizes_of
from ...kernels.pieces.text import key_mask, split_text
from ..layout import Grid, Layout
from ..methods import Method

MAX_ENTRIES = 2**24  # of queries x keys at a time: 64 MiB in float32


@dataclass
class Sums:
    """Sums over all recorded queries, in float64 on the CPU.

    Attributes:
        queries: Number of queries of each head.
        mass: [H, R].
        text: [H].
        distance: [H], in tokens, weighted by attention.
        error: [R + M], squared errors of the outputs, summed over heads.
        norm: [], squared outputs, summed over heads.
    """

    queries: int
    mass: Tensor
    text: Tensor
    distance: Tensor
    error: Tensor
    norm: Tensor


class Probe(Method):
    """Full attention that is measured.

    Args:
        radii: Radii of the windows in tokens, strict.
        kernels: Kernels of the methods to try, made for this module.
        num_queries: Image queries to sample in each call; all of them if the image has fewer.
        generator: CPU generator of the sample.
        call_counter: Numbers the probes of a model in the order of their first calls.
    """

    def __init__(
        self,
        radii: Sequence[float],
        kernels: Sequence[nn.Module] = (),
        *,
        num_heads: int,
        head_dim: int,
        num_queries: int,
        generator: torch.Generator,
        call_counter: Iterator[int],
    ) -> None:
        super().__init__(None, num_heads=num_heads, head_dim=head_dim)
        self.radii = radii
        self.kernels = nn.ModuleList(kernels)
        self.num_heads, self.head_dim = num_heads, head_dim
        self.num_queries = num_queries
        self.generator = generator
        self.call_counter = call_counter
        self.first_call = -1
        self.grid: Grid = ()
        self.text_len = 0
        double = torch.float64
        self.sums = Sums(
            queries=0,
            mass=torch.zeros(num_heads, len(radii), dtype=double),
            text=torch.zeros(num_heads, dtype=double),
            distance=torch.zeros(num_heads, dtype=double),
            error=torch.zeros(len(radii) + len(kernels), dtype=double),
            norm=torch.zeros((), dtype=double),
        )

    def prepare_for(self, grid: Grid) -> None:
        """As `Method.prepare_for`, for the kernels of the methods that are tried."""
        for kernel in self.kernels:
            cast(Any, kernel).prepare_for(grid)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float | None = None
    ) -> Tensor:
        """[B, H, N, D] -> [B, H, N, D]."""
        self._record(query, key, value, layout, query.shape[-1] ** -0.5 if scale is None else scale)
        mask = None
        if layout.text_mask is not None:
            mask = key_mask(layout.text_mask, layout.num_image_tokens, layout.text_first)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

    def _record(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> None:
        if self.first_call < 0:
            self.first_call = next(self.call_counter)
        self.grid, self.text_len = layout.grid, layout.text_len
        image_query = split_text(query, layout.text_len, layout.text_first)[1]
        # keys in one order, [image, text]
        keys, values = (
            torch.cat(split_text(x, layout.text_len, layout.text_first)[::-1], dim=2).float() for x in (key, value)
        )
        num_image = layout.num_image_tokens
        sample = torch.randperm(num_image, generator=self.generator)[: self.num_queries]
        rows = max(1, MAX_ENTRIES // (query.shape[0] * query.shape[1] * key.shape[2]))
        masked = None
        if layout.text_mask is not None:
            masked = pad(~layout.text_mask, (num_image, 0))[:, None, None]  # [B, 1, 1, N]
        kernel_outs = []
        for kernel in self.kernels:
            out = kernel(query, key, value, layout, scale=scale)
            image_out = split_text(out, layout.text_len, layout.text_first)[1]
            kernel_outs.append(image_out[:, :, sample.to(query.device)].float().split(rows, dim=2))
        for index, part in enumerate(sample.split(rows)):
            queries = image_query[:, :, part.to(query.device)].float()
            logits = scale * queries @ keys.mT  # [B, H, S, N]
            if masked is not None:
                logits = logits.masked_fill(masked, -torch.inf)
            self._accumulate(
                logits, values, _distances(part, layout.grid).to(query.device), [out[index] for out in kernel_outs]
            )

    def _accumulate(self, logits: Tensor, value: Tensor, distance: Tensor, kernel_outs: Sequence[Tensor]) -> None:
        """Add to the sums: logits [B, H, S, N], distances [S, image tokens], the kernels' outputs [B, H, S, D]."""
        sums = self.sums
        num_image = distance.shape[1]
        weights = logits.softmax(-1)
        out = weights @ value
        image = weights[..., :num_image]
        sums.queries += logits.shape[0] * logits.shape[2]
        sums.text += _by_head(weights[..., num_image:])
        sums.distance += _by_head(image * distance)
        sums.norm += out.square().sum().cpu()
        for index, radius in enumerate(self.radii):
            far = distance >= radius
            sums.mass[:, index] += _by_head(image.masked_fill(far, 0))
            near_out = logits.masked_fill(pad(far, (0, logits.shape[-1] - num_image)), -torch.inf).softmax(-1) @ value
            sums.error[index] += (near_out - out).square().sum().cpu()
        for index, kernel_out in enumerate(kernel_outs, start=len(self.radii)):
            sums.error[index] += (kernel_out - out).square().sum().cpu()


def _distances(queries: Tensor, grid: Grid) -> Tensor:
    """[S, image tokens] distances by row and column, in any frame, from each of these image tokens to all."""
    frames, height, width = sizes_of(grid)
    index = torch.arange(frames * height * width)
    row, column = index // width % height, index % width
    squares = (row[queries, None] - row) ** 2 + (column[queries, None] - column) ** 2
    return squares.double().sqrt().float()


def _by_head(weights: Tensor) -> Tensor:
    """[B, H, S, n] summed to [H]."""
    return weights.sum(-1).cpu().double().sum((0, 2))
