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


def _like_flux(num_layers: int) -> Arguments:
    """What the configs of FLUX and its relatives have in common."""
    return {
        "in_channels": 4,
        "num_layers": num_layers,
        "num_single_layers": num_layers,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 4, 8),
    }


def flux(num_layers: int = 1) -> nn.Module:
    return diffusers.FluxTransformer2DModel(**_like_flux(num_layers), pooled_projection_dim=32)


def flux_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    return {
        "hidden_states": torch.randn(batch, grid[0] * grid[1], 4),
        "encoder_hidden_states": torch.randn(batch, text_len, 32),
        "pooled_projections": torch.randn(batch, 32),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": position_ids(grid),
        "txt_ids": torch.zeros(text_len, 3),
    }


def without_pooled(grid: Grid, text_len: int, batch: int) -> Arguments:
    """FLUX's arguments, for its relatives that take no pooled text."""
    arguments = flux_inputs(grid, text_len, batch)
    del arguments["pooled_projections"]
    return arguments


def flux2(num_layers: int = 1) -> nn.Module:
    return diffusers.Flux2Transformer2DModel(**_like_flux(num_layers) | {"axes_dims_rope": (4, 4, 4, 4)})


def flux2_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    text_ids = torch.zeros(text_len, 4)
    text_ids[:, 3] = torch.arange(text_len)
    return without_pooled(grid, text_len, batch) | {
        "img_ids": position_ids(grid, axes=4),
        "txt_ids": text_ids,
        "guidance": torch.ones(batch),
    }


def flux3(num_layers: int = 1) -> nn.Module:
    config = _like_flux(num_layers) | {"axes_dims_rope": (4, 4, 4, 4), "cond_in_channels": 4}
    return diffusers.Flux3Transformer2DModel(**config)


def flux3_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """With a reference of 2 x 3 tokens."""
    arguments = flux2_inputs(grid, text_len, batch)
    del arguments["guidance"]
    reference = position_ids((2, 3), axes=4)
    reference[:, 0] = 10
    return arguments | {"image_cond_hidden_states": torch.randn(batch, 6, 4), "image_cond_ids": reference}


def chroma(num_layers: int = 1) -> nn.Module:
    return diffusers.ChromaTransformer2DModel(
        **_like_flux(num_layers),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )


def chroma_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """The last text token of the second sample is padding."""
    mask = torch.ones(batch, text_len + grid[0] * grid[1], dtype=torch.bool)
    mask[1:, text_len - 1] = False
    return without_pooled(grid, text_len, batch) | {"attention_mask": mask}


def bria(num_layers: int = 1) -> nn.Module:
    return diffusers.BriaTransformer2DModel(**_like_flux(num_layers))


def bria_fibo(num_layers: int = 1) -> nn.Module:
    return diffusers.BriaFiboTransformer2DModel(**_like_flux(num_layers), text_encoder_dim=16)


def bria_fibo_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """The last text token of the second sample is padding, told by queries and by keys, as its pipeline does."""
    arguments = without_pooled(grid, text_len, batch)
    attend = torch.ones(batch, text_len + grid[0] * grid[1])
    attend[1:, text_len - 1] = 0
    pairs = attend[:, None, :, None] * attend[:, None, None, :]
    return arguments | {
        "text_encoder_layers": [torch.randn(batch, text_len, 16) for _ in range(2)],
        "joint_attention_kwargs": {"attention_mask": torch.where(pairs == 1, 0.0, -torch.inf)},
    }


def longcat_image(num_layers: int = 1) -> nn.Module:
    return diffusers.LongCatImageTransformer2DModel(**_like_flux(num_layers), pooled_projection_dim=32)


def ovis_image(num_layers: int = 1) -> nn.Module:
    return diffusers.OvisImageTransformer2DModel(**_like_flux(num_layers), out_channels=4)


def krea2(num_layers: int = 2) -> nn.Module:
    return diffusers.Krea2Transformer2DModel(
        in_channels=4,
        num_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 8),
    )


def krea2_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """The last text token of the second sample is padding."""
    mask = torch.ones(batch, text_len, dtype=torch.bool)
    mask[1:, -1] = False
    return {
        "hidden_states": torch.randn(batch, grid[0] * grid[1], 4),
        "encoder_hidden_states": torch.randn(batch, text_len, 2, 16),
        "timestep": torch.full((batch,), 0.5),
        "position_ids": torch.cat([torch.zeros(text_len, 3), position_ids(grid)]),
        "encoder_attention_mask": mask,
    }


def ideogram4(num_layers: int = 2) -> nn.Module:
    return diffusers.Ideogram4Transformer2DModel(
        in_channels=4,
        num_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=32,
        adaln_dim=16,
        llm_features_dim=16,
        mrope_section=(4, 2, 2),
    )


def ideogram4_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """Without padding, whose outputs upstream makes of the padding alone."""
    num_image = grid[0] * grid[1]
    text = torch.arange(text_len)[:, None].repeat(1, 3)
    image = position_ids(grid, dtype=torch.long) + 65536
    kinds = torch.tensor([3] * text_len + [2] * num_image)
    return {
        "hidden_states": torch.randn(batch, text_len + num_image, 4),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": torch.randn(batch, text_len + num_image, 16),
        "position_ids": torch.cat([text, image]).repeat(batch, 1, 1),
        "segment_ids": torch.ones(batch, text_len + num_image, dtype=torch.long),
        "indicator": kinds.repeat(batch, 1),
    }


POSITIONS = {
    "flux": Tiny(needs="FluxTransformer2DModel", make=flux, inputs=flux_inputs, num_attention=2),
    "flux2": Tiny(needs="Flux2Transformer2DModel", make=flux2, inputs=flux2_inputs, num_attention=2),
    "flux3": Tiny(needs="Flux3Transformer2DModel", make=flux3, inputs=flux3_inputs, num_attention=2),
    "ideogram4": Tiny(needs="Ideogram4Transformer2DModel", make=ideogram4, inputs=ideogram4_inputs, num_attention=2),
    "chroma": Tiny(needs="ChromaTransformer2DModel", make=chroma, inputs=chroma_inputs, num_attention=2),
    "bria": Tiny(needs="BriaTransformer2DModel", make=bria, inputs=without_pooled, num_attention=2),
    "bria-fibo": Tiny(needs="BriaFiboTransformer2DModel", make=bria_fibo, inputs=bria_fibo_inputs, num_attention=2),
    "longcat-image": Tiny(
        needs="LongCatImageTransformer2DModel", make=longcat_image, inputs=without_pooled, num_attention=2
    ),
    "ovis-image": Tiny(needs="OvisImageTransformer2DModel", make=ovis_image, inputs=without_pooled, num_attention=2),
    "krea2": Tiny(needs="Krea2Transformer2DModel", make=krea2, inputs=krea2_inputs, num_attention=2),
}
