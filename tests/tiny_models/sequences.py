"""Models that pack text and image into one sequence by the samples' own lengths."""

import inspect

import diffusers
import torch
from torch import nn

from .joint_latents import joy_image_config
from .latents import latents
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


def qwen_image_21(num_layers: int = 2) -> nn.Module:
    return diffusers.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(4, 4, 8),
    )


def qwen_image_21_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """Sides are even, as every image slot of its text encoder is 2 x 2 tokens; the second text ends with padding."""
    height, width = (side + side % 2 for side in grid)
    mask = torch.ones(batch, text_len, dtype=torch.bool)
    mask[1:, -1] = False
    return {
        "hidden_states": torch.randn(batch, height * width, 4),
        "encoder_hidden_states": torch.randn(batch, text_len, 16),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, height, width)]] * batch,
        "img_mask": torch.tensor([False] * text_len + [True] * (height * width // 4)).repeat(batch, 1),
    }


def bria_fibo2(num_layers: int = 2) -> nn.Module:
    return diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=num_layers,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=16,
        injection_layer_ids=(0,),
        perceiver_num_layers=1,
        min_num_gist_tokens=2,
        max_num_gist_tokens=6,
        gist_step=1,
        gist_min_text_len=0,
        gist_max_text_len=8,
        axes_dims=(4, 4, 8),
        axes_lens=(64, 128, 128),
    )


def bria_fibo2_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """A reference of 2 x 3 tokens. The second text is shorter, so that its gist is as well and stands last."""
    mask = torch.ones(batch, text_len, dtype=torch.bool)
    mask[1:, -1] = False
    return {
        "hidden_states": latents(grid, batch),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": torch.randn(batch, 2, text_len, 16),
        "encoder_attention_mask": mask,
        "context_latents": [latents((2, 3), batch)],
    }


def joy_image_plus(num_layers: int = 2) -> nn.Module:
    return diffusers.JoyImageEditPlusTransformer3DModel(**joy_image_config(num_layers))


def joy_image_plus_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """A reference of 2 x 3 tokens and one token of padding; the last text token of the second sample is padding."""
    mask = torch.ones(batch, text_len)
    mask[1:, -1] = 0
    return {
        "hidden_states": torch.randn(batch, grid[0] * grid[1] + 7, 4, 1, 2, 2),
        "timestep": torch.full((batch,), 5.0),
        "encoder_hidden_states": torch.randn(batch, text_len, 16),
        "encoder_hidden_states_mask": mask,
        "shape_list": [[(1, *grid), (1, 2, 3)]] * batch,
    }


SEQUENCES = {
    "lumina2": Tiny(needs="Lumina2Transformer2DModel", make=lumina2, inputs=lumina2_inputs, num_attention=2),
    "qwen-image": Tiny(needs="QwenImageTransformer2DModel", make=qwen_image, inputs=qwen_image_inputs, num_attention=2),
    "nucleus-image": Tiny(
        needs="NucleusMoEImageTransformer2DModel", make=nucleus_image, inputs=qwen_image_inputs, num_attention=2
    ),
    "qwen-image-21": Tiny(
        needs="QwenImage21Transformer2DModel", make=qwen_image_21, inputs=qwen_image_21_inputs, num_attention=2
    ),
    "bria-fibo2": Tiny(needs="BriaFibo2Transformer2DModel", make=bria_fibo2, inputs=bria_fibo2_inputs, num_attention=3),
    "joy-image-plus": Tiny(
        needs="JoyImageEditPlusTransformer3DModel", make=joy_image_plus, inputs=joy_image_plus_inputs, num_attention=2
    ),
    "z-image": Tiny(needs="ZImageTransformer2DModel", make=z_image, inputs=z_image_inputs, num_attention=2),
}
