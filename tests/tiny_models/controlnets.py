"""ControlNets, whose own attention is as costly as that of the model they control."""

import torch

from .latents import UNET, unet_inputs
from .sequences import QWEN_IMAGE, qwen_image_inputs
from .tiny import Arguments, Grid, Tiny


def unet_controlnet_xs_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """Even sides, which upstream halves and doubles again; a control image of 2 x 2 pixels for each latent."""
    height, width = (side + side % 2 for side in grid)
    return unet_inputs(grid, text_len, batch) | {
        "sample": torch.randn(batch, 4, height, width),
        "controlnet_cond": torch.randn(batch, 3, 2 * height, 2 * width),
    }


CONTROLNETS = {
    "flux-controlnet": Tiny(needs="FluxControlNetModel"),
    "sd3-controlnet": Tiny(needs="SD3ControlNetModel"),
    "unet-controlnet": Tiny(
        needs="ControlNetModel",
        config=UNET | {"conditioning_embedding_out_channels": (8, 8)},
        inputs=unet_inputs,
        num_attention=3,
    ),
    "unet-controlnet-xs": Tiny(
        needs="UNetControlNetXSModel",
        config={
            "block_out_channels": (16, 32),
            "ctrl_block_out_channels": (8, 16),
            "ctrl_conditioning_embedding_out_channels": (8, 8),
            "ctrl_max_norm_num_groups": 4,
            "ctrl_num_attention_heads": 2,
            "down_block_types": ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2,
            "upcast_attention": False,
        },
        inputs=unet_controlnet_xs_inputs,
        num_attention=16,
    ),
    "hunyuan-dit-controlnet": Tiny(
        needs="HunyuanDiT2DControlNetModel", config={"patch_size": 2, "transformer_num_layers": 6}
    ),
    "qwen-image-controlnet": Tiny(needs="QwenImageControlNetModel", config=QWEN_IMAGE, inputs=qwen_image_inputs),
}
