"""Models that take latents as an image, with text in the same attention."""

import torch

from .latents import latents
from .tiny import Arguments, Grid, Tiny


def hunyuan_image_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """A second text of two tokens."""
    return {
        "encoder_hidden_states_2": torch.randn(batch, 2, 16),
        "encoder_attention_mask_2": torch.ones(batch, 2, dtype=torch.bool),
    }


def ernie_image_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """The last text token of the second sample is padding."""
    return {
        "hidden_states": latents(grid, batch),
        "timestep": torch.full((batch,), 5.0),
        "text_bth": torch.randn(batch, text_len, 16),
        "text_lens": torch.tensor([text_len] + [text_len - 1] * (batch - 1)),
    }


def hidream_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """Its room for pictures that are not square is 256 tokens."""
    return {
        "hidden_states": latents(grid, batch),
        "timesteps": torch.full((batch,), 5.0),
        "encoder_hidden_states_t5": torch.randn(batch, text_len, 16),
        "encoder_hidden_states_llama3": torch.randn(2, batch, text_len, 16),
        "pooled_embeds": torch.randn(batch, 16),
    }


def joy_image_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """A picture and one to edit."""
    return {"hidden_states": torch.randn(batch, 2, 4, 1, 2 * grid[0], 2 * grid[1])}


def prx_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """The last text token of the second sample is padding."""
    mask = torch.ones(batch, text_len, dtype=torch.bool)
    mask[1:, -1] = False
    return {"attention_mask": mask}


JOY_IMAGE = {"patch_size": (1, 2, 2), "rope_dim_list": (4, 4, 8)}

JOINT_LATENTS = {
    "sd3": Tiny(
        needs="SD3Transformer2DModel", config={"dual_attention_layers": (0,), "qk_norm": "rms_norm"}, num_attention=3
    ),
    "auraflow": Tiny(needs="AuraFlowTransformer2DModel", config={"pos_embed_max_size": 1024}),
    "hunyuan-image": Tiny(
        needs="HunyuanImageTransformer2DModel",
        config={"patch_size": (1, 1), "rope_axes_dim": (8, 8), "text_embed_2_dim": 16},
        inputs=hunyuan_image_inputs,
    ),
    "cogview4": Tiny(needs="CogView4Transformer2DModel", config={"rope_axes_dim": (16, 16)}),
    "cogview3-plus": Tiny(needs="CogView3PlusTransformer2DModel"),
    "glm-image": Tiny(needs="GlmImageTransformer2DModel", config={"prior_vq_quantizer_codebook_size": 8}),
    "ernie-image": Tiny(
        needs="ErnieImageTransformer2DModel",
        config={"ffn_hidden_size": 64, "patch_size": 2, "text_in_dim": 16},
        inputs=ernie_image_inputs,
    ),
    "hidream": Tiny(
        needs="HiDreamImageTransformer2DModel",
        config={
            "axes_dims_rope": (8, 4, 4),
            "caption_channels": (16, 16),
            "llama_layers": (0, 1),
            "max_resolution": (16, 16),
            "num_activated_experts": 1,
            "num_routed_experts": 2,
            "patch_size": 2,
            "text_emb_dim": 16,
        },
        inputs=hidream_inputs,
    ),
    "joy-image": Tiny(needs="JoyImageEditTransformer3DModel", config=JOY_IMAGE, inputs=joy_image_inputs),
    "prx": Tiny(needs="PRXTransformer2DModel", config={"axes_dim": (8, 8)}, inputs=prx_inputs),
}
