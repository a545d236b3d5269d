"""Models that are told the position of every token."""

import diffusers
import torch
from torch import Tensor, nn

from .tiny import Arguments, Grid, Tiny


def position_ids(grid: Grid, *, dtype: torch.dtype = torch.float32, offset: int = 0, axes: int = 3) -> Tensor:
    """[height * width, axes]: row and column in columns 1 and 2, else zero."""
    rows, cols = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    zeros = torch.zeros_like(rows)
    ids = torch.stack([zeros, rows + offset, cols + offset, *[zeros] * (axes - 3)], dim=-1).flatten(0, 1)
    return ids.to(dtype)


def flux(num_layers: int = 1) -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=num_layers,
        num_single_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


def flux_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    return {
        "hidden_states": torch.randn(batch, grid[0] * grid[1], 4),
        "encoder_hidden_states": torch.randn(batch, text_len, 32),
        "pooled_projections": torch.randn(batch, 32),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": position_ids(grid),
        "txt_ids": torch.zeros(text_len, 3),
    }


def flux2(num_layers: int = 1) -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=num_layers,
        num_single_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 4, 4),
    )


def flux2_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    arguments = flux_inputs(grid, text_len, batch)
    del arguments["pooled_projections"]
    text_ids = torch.zeros(text_len, 4)
    text_ids[:, 3] = torch.arange(text_len)
    return arguments | {
        "img_ids": position_ids(grid, axes=4),
        "txt_ids": text_ids,
        "guidance": torch.ones(batch),
    }


def chroma(num_layers: int = 1) -> nn.Module:
    return diffusers.ChromaTransformer2DModel(
        in_channels=4,
        num_layers=num_layers,
        num_single_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )


def chroma_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """The last text token of the second sample is padding."""
    arguments = flux_inputs(grid, text_len, batch)
    del arguments["pooled_projections"]
    mask = torch.ones(batch, text_len + grid[0] * grid[1], dtype=torch.bool)
    mask[1:, text_len - 1] = False
    return arguments | {"attention_mask": mask}


POSITIONS = {
    "flux": Tiny(needs="FluxTransformer2DModel", make=flux, inputs=flux_inputs, num_attention=2),
    "flux2": Tiny(needs="Flux2Transformer2DModel", make=flux2, inputs=flux2_inputs, num_attention=2),
    "chroma": Tiny(needs="ChromaTransformer2DModel", make=chroma, inputs=chroma_inputs, num_attention=2),
}
