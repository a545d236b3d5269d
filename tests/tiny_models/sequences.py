"""Models that pack text and image into one sequence by the samples' own lengths."""

import torch

from .joint_latents import JOY_IMAGE
from .latents import latents
from .tiny import Arguments, Grid, Tiny


def qwen_image_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """The last text token of the second sample is padding."""
    mask = torch.ones(batch, text_len, dtype=torch.long)
    mask[1:, -1] = 0
    return {"encoder_hidden_states_mask": mask}


def z_image_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """The second sample's text fills another block of 32 tokens."""
    return {"cap_feats": [torch.randn(text_len + 32 * sample, 16) for sample in range(batch)]}


def qwen_image_21_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """Sides are even, as every image slot of its text encoder is 2 x 2 tokens; the second text ends with padding."""
    height, width = (side + side % 2 for side in grid)
    mask = torch.ones(batch, text_len, dtype=torch.bool)
    mask[1:, -1] = False
    return {
        "hidden_states": torch.randn(batch, height * width, 4),
        "encoder_hidden_states_mask": mask,
        "img_shapes": [[(1, height, width)]] * batch,
        "img_mask": torch.tensor([False] * text_len + [True] * (height * width // 4)).repeat(batch, 1),
    }


def bria_fibo2_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """A reference of 2 x 3 tokens."""
    return {"context_latents": [latents((2, 3), batch)]}


def joy_image_plus_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """A reference of 2 x 3 tokens and one token of padding; the last text token of the second sample is padding."""
    mask = torch.ones(batch, text_len)
    mask[1:, -1] = 0
    return {
        "hidden_states": torch.randn(batch, grid[0] * grid[1] + 7, 4, 1, 2, 2),
        "encoder_hidden_states_mask": mask,
        "shape_list": [[(1, *grid), (1, 2, 3)]] * batch,
    }


QWEN_IMAGE = {"in_channels": 16}  # four channels of two by two latents

SEQUENCES = {
    "lumina2": Tiny(
        needs="Lumina2Transformer2DModel",
        config={"axes_lens": (32, 32, 32), "cap_feat_dim": 32, "num_layers": 1},
    ),
    "qwen-image": Tiny(needs="QwenImageTransformer2DModel", config=QWEN_IMAGE, inputs=qwen_image_inputs),
    "nucleus-image": Tiny(
        needs="NucleusMoEImageTransformer2DModel",
        config=QWEN_IMAGE | {"capacity_factors": (8.0, 8.0), "moe_enabled": False},
        inputs=qwen_image_inputs,
    ),
    "qwen-image-21": Tiny(needs="QwenImage21Transformer2DModel", inputs=qwen_image_21_inputs),
    "bria-fibo2": Tiny(
        needs="BriaFibo2Transformer2DModel",
        config={
            "axes_lens": (64, 128, 128),
            "gist_max_text_len": 8,
            "gist_min_text_len": 0,
            "gist_step": 1,
            "injection_layer_ids": (0,),
            "max_num_gist_tokens": 6,
            "min_num_gist_tokens": 2,
            "perceiver_num_layers": 1,
        },
        inputs=bria_fibo2_inputs,
        num_attention=3,
    ),
    "joy-image-plus": Tiny(needs="JoyImageEditPlusTransformer3DModel", config=JOY_IMAGE, inputs=joy_image_plus_inputs),
    "z-image": Tiny(
        needs="ZImageTransformer2DModel", config={"axes_lens": (512, 32, 32), "n_layers": 1}, inputs=z_image_inputs
    ),
}
