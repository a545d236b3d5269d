"""Models that take latents as an image, with text in the same attention."""

import diffusers
import torch
from torch import nn

from .latents import latents
from .tiny import Arguments, Grid, Tiny, awake


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
        "hidden_states": latents(grid, batch),
        "encoder_hidden_states": torch.randn(batch, text_len, 32),
        "pooled_projections": torch.randn(batch, 32),
        "timestep": torch.full((batch,), 5),
    }


def auraflow(num_layers: int = 1) -> nn.Module:
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=num_layers,
        num_single_dit_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=1024,
    )


def auraflow_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    return {
        "hidden_states": latents(grid, batch),
        "encoder_hidden_states": torch.randn(batch, text_len, 32),
        "timestep": torch.full((batch,), 0.5),
    }


def hunyuan_image(num_layers: int = 1) -> nn.Module:
    return diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=num_layers,
        num_single_layers=num_layers,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=32,
        text_embed_2_dim=16,
        rope_axes_dim=(8, 8),
    )


def hunyuan_image_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """The last token of the second sample's first text is padding."""
    mask = torch.ones(batch, text_len)
    mask[1:, -1] = 0
    return {
        "hidden_states": torch.randn(batch, 4, *grid),
        "timestep": torch.full((batch,), 5.0),
        "encoder_hidden_states": torch.randn(batch, text_len, 32),
        "encoder_attention_mask": mask,
        "encoder_hidden_states_2": torch.randn(batch, 2, 16),
        "encoder_attention_mask_2": torch.ones(batch, 2),
    }


def cogview4(num_layers: int = 2) -> nn.Module:
    return diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(16, 16),
    )


def cogview4_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    return {
        "hidden_states": latents(grid, batch),
        "encoder_hidden_states": torch.randn(batch, text_len, 32),
        "timestep": torch.full((batch,), 5),
        "original_size": torch.full((batch, 2), 16.0),
        "target_size": torch.full((batch, 2), 16.0),
        "crop_coords": torch.zeros(batch, 2),
    }


def cogview3_plus(num_layers: int = 2) -> nn.Module:
    return diffusers.CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=32,
        sample_size=16,
    )


def glm_image(num_layers: int = 2) -> nn.Module:
    return diffusers.GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=8,
    )


def glm_image_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    return {
        "hidden_states": latents(grid, batch),
        "encoder_hidden_states": torch.randn(batch, text_len, 32),
        "prior_token_id": torch.randint(8, (batch, grid[0] * grid[1])),
        "prior_token_drop": torch.zeros(batch, dtype=torch.bool),
        "timestep": torch.full((batch,), 5),
        "target_size": torch.full((batch, 2), 16.0),
        "crop_coords": torch.zeros(batch, 2),
    }


def ernie_image(num_layers: int = 2) -> nn.Module:
    return awake(
        diffusers.ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=num_layers,
            ffn_hidden_size=64,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            text_in_dim=16,
            rope_axes_dim=(4, 4, 8),
        )
    )


def ernie_image_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """The last text token of the second sample is padding."""
    return {
        "hidden_states": latents(grid, batch),
        "timestep": torch.full((batch,), 5.0),
        "text_bth": torch.randn(batch, text_len, 16),
        "text_lens": torch.tensor([text_len] + [text_len - 1] * (batch - 1)),
    }


def hidream(num_layers: int = 1) -> nn.Module:
    return diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=num_layers,
        num_single_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[16, 16],
        text_emb_dim=16,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(16, 16),
        llama_layers=[0, 1],
    )


def hidream_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """Its room for pictures that are not square is 256 tokens."""
    return {
        "hidden_states": latents(grid, batch),
        "timesteps": torch.full((batch,), 5.0),
        "encoder_hidden_states_t5": torch.randn(batch, text_len, 16),
        "encoder_hidden_states_llama3": torch.randn(2, batch, text_len, 16),
        "pooled_embeds": torch.randn(batch, 16),
    }


def joy_image_config(num_layers: int) -> Arguments:
    return {
        "patch_size": [1, 2, 2],
        "in_channels": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "text_dim": 16,
        "num_layers": num_layers,
        "rope_dim_list": [4, 4, 8],
    }


def joy_image(num_layers: int = 2) -> nn.Module:
    return diffusers.JoyImageEditTransformer3DModel(**joy_image_config(num_layers))


def joy_image_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """A picture and one to edit."""
    return {
        "hidden_states": torch.randn(batch, 2, 4, 1, 2 * grid[0], 2 * grid[1]),
        "timestep": torch.full((batch,), 5.0),
        "encoder_hidden_states": torch.randn(batch, text_len, 16),
    }


def prx(num_layers: int = 2) -> nn.Module:
    return awake(
        diffusers.PRXTransformer2DModel(
            in_channels=4,
            patch_size=2,
            context_in_dim=16,
            hidden_size=32,
            num_heads=2,
            depth=num_layers,
            axes_dim=[8, 8],
        )
    )


def prx_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """The last text token of the second sample is padding."""
    mask = torch.ones(batch, text_len, dtype=torch.bool)
    mask[1:, -1] = False
    return {
        "hidden_states": latents(grid, batch),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": torch.randn(batch, text_len, 16),
        "attention_mask": mask,
    }


JOINT_LATENTS = {
    "sd3": Tiny(needs="SD3Transformer2DModel", make=sd3, inputs=sd3_inputs, num_attention=3),
    "auraflow": Tiny(needs="AuraFlowTransformer2DModel", make=auraflow, inputs=auraflow_inputs, num_attention=2),
    "hunyuan-image": Tiny(
        needs="HunyuanImageTransformer2DModel", make=hunyuan_image, inputs=hunyuan_image_inputs, num_attention=2
    ),
    "cogview4": Tiny(needs="CogView4Transformer2DModel", make=cogview4, inputs=cogview4_inputs, num_attention=2),
    "cogview3-plus": Tiny(
        needs="CogView3PlusTransformer2DModel", make=cogview3_plus, inputs=cogview4_inputs, num_attention=2
    ),
    "glm-image": Tiny(needs="GlmImageTransformer2DModel", make=glm_image, inputs=glm_image_inputs, num_attention=2),
    "ernie-image": Tiny(
        needs="ErnieImageTransformer2DModel", make=ernie_image, inputs=ernie_image_inputs, num_attention=2
    ),
    "hidream": Tiny(needs="HiDreamImageTransformer2DModel", make=hidream, inputs=hidream_inputs, num_attention=2),
    "joy-image": Tiny(needs="JoyImageEditTransformer3DModel", make=joy_image, inputs=joy_image_inputs, num_attention=2),
    "prx": Tiny(needs="PRXTransformer2DModel", make=prx, inputs=prx_inputs, num_attention=2),
}
