"""Models that pack text and image into one sequence by the samples' own lengths."""

import inspect

import diffusers
import torch
from torch import nn

from .tiny import Arguments, Grid, Tiny


def lumina2(num_layers: int = 1) -> nn.Module:
    return diffusers.Lumina2Transformer2DModel(
        sample_size=16,
        num_layers=num_layers,
        num_refiner_layers=1,
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cap_feat_dim=32,
        axes_dim_rope=(4, 4, 8),
        axes_lens=(32, 32, 32),
    )


def lumina2_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """The second sample's text is a token shorter, so that its image begins a token earlier."""
    mask = torch.ones(batch, text_len, dtype=torch.bool)
    mask[1:, -1] = False
    return {
        "hidden_states": torch.randn(batch, 4, 2 * grid[0], 2 * grid[1]),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": torch.randn(batch, text_len, 32),
        "encoder_attention_mask": mask,
    }


def qwen_image(num_layers: int = 2) -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


def qwen_image_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """The last text token of the second sample is padding."""
    mask = torch.ones(batch, text_len, dtype=torch.long)
    mask[1:, -1] = 0
    takes = inspect.signature(diffusers.QwenImageTransformer2DModel.forward).parameters
    lengths = {"txt_seq_lens": [text_len] * batch} if "txt_seq_lens" in takes else {}  # older versions ask for them
    return lengths | {
        "hidden_states": torch.randn(batch, grid[0] * grid[1], 16),
        "encoder_hidden_states": torch.randn(batch, text_len, 32),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, *grid)]] * batch,
    }


def z_image(num_layers: int = 1) -> nn.Module:
    return diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=num_layers,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 4, 8],
        axes_lens=[512, 32, 32],
    )


def z_image_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """The second sample's text fills another block of 32 tokens."""
    return {
        "x": [torch.randn(4, 1, 2 * grid[0], 2 * grid[1]) for _ in range(batch)],
        "t": torch.full((batch,), 0.5),
        "cap_feats": [torch.randn(text_len + 32 * sample, 16) for sample in range(batch)],
    }


def nucleus_image(num_layers: int = 2) -> nn.Module:
    return diffusers.NucleusMoEImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        moe_enabled=False,
        capacity_factors=[8.0] * num_layers,
    )


SEQUENCES = {
    "lumina2": Tiny(needs="Lumina2Transformer2DModel", make=lumina2, inputs=lumina2_inputs, num_attention=2),
    "qwen-image": Tiny(needs="QwenImageTransformer2DModel", make=qwen_image, inputs=qwen_image_inputs, num_attention=2),
    "nucleus-image": Tiny(
        needs="NucleusMoEImageTransformer2DModel", make=nucleus_image, inputs=qwen_image_inputs, num_attention=2
    ),
    "z-image": Tiny(needs="ZImageTransformer2DModel", make=z_image, inputs=z_image_inputs, num_attention=2),
}
