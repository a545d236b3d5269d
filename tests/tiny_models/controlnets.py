"""ControlNets, whose own attention is as costly as that of the model they steer."""

import diffusers
import torch
from torch import nn

from .joint_latents import sd3_inputs
from .latents import hunyuan_dit_inputs, unet_inputs
from .positions import flux_inputs
from .sequences import qwen_image_inputs
from .tiny import Arguments, Grid, Tiny, awake


def flux_controlnet(num_layers: int = 1) -> nn.Module:
    return awake(
        diffusers.FluxControlNetModel(
            in_channels=4,
            num_layers=num_layers,
            num_single_layers=num_layers,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
        )
    )


def flux_controlnet_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    arguments = flux_inputs(grid, text_len, batch)
    return arguments | {"controlnet_cond": torch.randn_like(arguments["hidden_states"])}


def sd3_controlnet(num_layers: int = 2) -> nn.Module:
    return awake(
        diffusers.SD3ControlNetModel(
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
        )
    )


def sd3_controlnet_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    arguments = sd3_inputs(grid, text_len, batch)
    return arguments | {"controlnet_cond": torch.randn_like(arguments["hidden_states"])}


def unet_controlnet(num_layers: int = 1) -> nn.Module:
    return awake(
        diffusers.ControlNetModel(
            block_out_channels=(16, 32),
            layers_per_block=num_layers,
            in_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=8,
            conditioning_embedding_out_channels=(8, 8),
        )
    )


def unet_controlnet_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """The picture that steers has two pixels for each latent."""
    picture = torch.randn(batch, 3, 2 * grid[0], 2 * grid[1])
    return unet_inputs(grid, text_len, batch) | {"controlnet_cond": picture}


def hunyuan_dit_controlnet(num_layers: int = 6) -> nn.Module:
    return awake(
        diffusers.HunyuanDiT2DControlNetModel(
            sample_size=16,
            transformer_num_layers=num_layers,
            patch_size=2,
            attention_head_dim=16,
            num_attention_heads=2,
            in_channels=4,
            cross_attention_dim=32,
            cross_attention_dim_t5=32,
            pooled_projection_dim=16,
            hidden_size=32,
            text_len=4,
            text_len_t5=4,
        )
    )


def hunyuan_dit_controlnet_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    arguments = hunyuan_dit_inputs(grid, text_len, batch)
    return arguments | {"controlnet_cond": torch.randn_like(arguments["hidden_states"])}


def qwen_image_controlnet(num_layers: int = 2) -> nn.Module:
    return awake(
        diffusers.QwenImageControlNetModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=num_layers,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
        )
    )


def qwen_image_controlnet_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    arguments = qwen_image_inputs(grid, text_len, batch)
    return arguments | {"controlnet_cond": torch.randn_like(arguments["hidden_states"])}


CONTROLNETS = {
    "flux-controlnet": Tiny(
        needs="FluxControlNetModel", make=flux_controlnet, inputs=flux_controlnet_inputs, num_attention=2
    ),
    "sd3-controlnet": Tiny(
        needs="SD3ControlNetModel", make=sd3_controlnet, inputs=sd3_controlnet_inputs, num_attention=2
    ),
    "unet-controlnet": Tiny(
        needs="ControlNetModel", make=unet_controlnet, inputs=unet_controlnet_inputs, num_attention=3
    ),
    "hunyuan-dit-controlnet": Tiny(
        needs="HunyuanDiT2DControlNetModel",
        make=hunyuan_dit_controlnet,
        inputs=hunyuan_dit_controlnet_inputs,
        num_attention=2,
    ),
    "qwen-image-controlnet": Tiny(
        needs="QwenImageControlNetModel",
        make=qwen_image_controlnet,
        inputs=qwen_image_controlnet_inputs,
        num_attention=2,
    ),
}
