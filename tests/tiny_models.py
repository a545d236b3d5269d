"""Tiny models with random weights, one function for each family, with the arguments of a forward.

A builder takes the token grid, the length of the text and the batch, and gives (model, arguments). `inputs_of` makes
arguments at another size for a model that is already there. A new family is one builder and one line of `BUILDERS`.
"""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

Grid = tuple[int, int]
Arguments = dict[str, Any]

diffusers.utils.logging.set_verbosity_error()


def position_ids(grid: Grid, *, dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
    """[height * width, 3]: zero, row, column."""
    rows, cols = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows + offset, cols + offset], dim=-1).flatten(0, 1)
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


def sd3(num_layers: int = 2) -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=32,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def sd3_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    return {
        "hidden_states": torch.randn(batch, 4, 2 * grid[0], 2 * grid[1]),
        "encoder_hidden_states": torch.randn(batch, text_len, 32),
        "pooled_projections": torch.randn(batch, 32),
        "timestep": torch.full((batch,), 5),
    }


def pixart(num_layers: int = 2) -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        sample_size=16,
        num_layers=num_layers,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=32,
        out_channels=8,
        caption_channels=32,
        use_additional_conditions=False,
    )


def pixart_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    return {
        "hidden_states": torch.randn(batch, 4, 2 * grid[0], 2 * grid[1]),
        "encoder_hidden_states": torch.randn(batch, text_len, 32),
        "encoder_attention_mask": torch.ones(batch, text_len),
        "timestep": torch.full((batch,), 5),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def unet(num_layers: int = 1) -> nn.Module:
    """Attention at two levels: the grid, and half of it rounded up."""
    return diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=num_layers,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def unet_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    return {
        "sample": torch.randn(batch, 4, *grid),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": torch.randn(batch, text_len, 32),
    }


Builder = Callable[[int], nn.Module]
InputsOf = Callable[[Grid, int, int], Arguments]
# name -> (model of so many layers, arguments of its forward, self-attention modules at the default number of layers)
BUILDERS: dict[str, tuple[Callable[..., nn.Module], InputsOf, int]] = {
    "flux": (flux, flux_inputs, 2),
    "sd3": (sd3, sd3_inputs, 3),
    "pixart": (pixart, pixart_inputs, 2),
    "unet": (unet, unet_inputs, 7),
}
FAMILIES = tuple(BUILDERS)


def build(family: str, *, num_layers: int | None = None) -> nn.Module:
    """A model in eval mode, the same weights for the same global seed."""
    make = BUILDERS[family][0]
    return (make() if num_layers is None else make(num_layers)).eval()


def inputs_of(family: str, *, grid: Grid = (5, 7), text_len: int = 3, batch: int = 2) -> Arguments:
    """Arguments of one forward."""
    return BUILDERS[family][1](grid, text_len, batch)


def cast(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The same arguments, floating tensors in `dtype`; position ids stay as they are."""
    return {
        name: value.to(dtype)
        if isinstance(value, Tensor) and value.is_floating_point() and not name.endswith("_ids")
        else value
        for name, value in arguments.items()
    }


def run(model: nn.Module, arguments: Arguments) -> Tensor:
    """The model's output, without gradients."""
    with torch.no_grad():
        return model(**arguments, return_dict=False)[0]
