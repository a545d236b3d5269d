"""Models that take latents as an image or a video, with attention of the image alone."""

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from torch import nn

from .tiny import Arguments, Grid, Tiny, awake


def latents(grid: Grid, batch: int) -> torch.Tensor:
    """Two by two for each token."""
    return torch.randn(batch, 4, 2 * grid[0], 2 * grid[1])


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
        "hidden_states": latents(grid, batch),
        "encoder_hidden_states": torch.randn(batch, text_len, 32),
        "encoder_attention_mask": torch.ones(batch, text_len),
        "timestep": torch.full((batch,), 5),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def dit(num_layers: int = 2) -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        sample_size=16,
        num_layers=num_layers,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=8,
    )


def dit_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """Square, as DiT has it: the longer side of the grid."""
    side = max(grid)
    return {
        "hidden_states": latents((side, side), batch),
        "timestep": torch.full((batch,), 5),
        "class_labels": torch.arange(batch),
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


def hunyuan_dit(num_layers: int = 4) -> nn.Module:
    return diffusers.HunyuanDiT2DModel(
        sample_size=16,
        num_layers=num_layers,
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


def hunyuan_dit_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """Its text is as long as its config says."""
    return {
        "hidden_states": latents(grid, batch),
        "timestep": torch.full((batch,), 5.0),
        "encoder_hidden_states": torch.randn(batch, 4, 32),
        "text_embedding_mask": torch.ones(batch, 4),
        "encoder_hidden_states_t5": torch.randn(batch, 4, 32),
        "text_embedding_mask_t5": torch.ones(batch, 4),
        "image_meta_size": torch.full((batch, 6), 16.0),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": get_2d_rotary_pos_embed(16, ((0, 0), grid), grid, output_type="pt"),
    }


def wan_config(num_layers: int) -> Arguments:
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "ffn_dim": 32,
        "num_layers": num_layers,
        "rope_max_seq_len": 32,
    }


def wan(num_layers: int = 2) -> nn.Module:
    return diffusers.WanTransformer3DModel(**wan_config(num_layers))


def wan_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """Two frames."""
    return {
        "hidden_states": torch.randn(batch, 4, 2, 2 * grid[0], 2 * grid[1]),
        "encoder_hidden_states": torch.randn(batch, text_len, 16),
        "timestep": torch.full((batch,), 5),
    }


def chronoedit(num_layers: int = 2) -> nn.Module:
    return diffusers.ChronoEditTransformer3DModel(**wan_config(num_layers))


def cosmos(num_layers: int = 2) -> nn.Module:
    return diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=num_layers,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 64, 64),
        rope_scale=(1.0, 1.0, 1.0),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    )


def cosmos_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """A picture: one frame."""
    return {
        "hidden_states": latents(grid, batch)[:, :, None],
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": torch.randn(batch, text_len, 32),
    }


def kandinsky5(num_layers: int = 2) -> nn.Module:
    return awake(
        diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=16,
            time_dim=16,
            out_visual_dim=4,
            model_dim=32,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=num_layers,
            axes_dims=(4, 4, 8),
        ),
        std=0.03,
    )


def kandinsky5_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """A picture: one frame; channels come last."""
    return {
        "hidden_states": latents(grid, batch)[:, :, None].movedim(1, -1),
        "encoder_hidden_states": torch.randn(batch, text_len, 16),
        "timestep": torch.full((batch,), 0.5),
        "pooled_projections": torch.randn(batch, 16),
        "visual_rope_pos": [torch.arange(side) for side in (1, *grid)],
        "text_rope_pos": torch.arange(text_len),
    }


def lumina_next(num_layers: int = 2) -> nn.Module:
    return diffusers.LuminaNextDiT2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=num_layers,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        learn_sigma=False,
        cross_attention_dim=32,
    )


def lumina_next_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    return {
        "hidden_states": latents(grid, batch),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": torch.randn(batch, text_len, 32),
        "encoder_mask": torch.ones(batch, text_len),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 48, 48),
        "cross_attention_kwargs": {},
    }


LATENTS = {
    "pixart": Tiny(needs="PixArtTransformer2DModel", make=pixart, inputs=pixart_inputs, num_attention=2),
    "dit": Tiny(needs="DiTTransformer2DModel", make=dit, inputs=dit_inputs, num_attention=2),
    "unet": Tiny(needs="UNet2DConditionModel", make=unet, inputs=unet_inputs, num_attention=7),
    "hunyuan-dit": Tiny(needs="HunyuanDiT2DModel", make=hunyuan_dit, inputs=hunyuan_dit_inputs, num_attention=4),
    "lumina-next": Tiny(needs="LuminaNextDiT2DModel", make=lumina_next, inputs=lumina_next_inputs, num_attention=2),
    "wan": Tiny(needs="WanTransformer3DModel", make=wan, inputs=wan_inputs, num_attention=2),
    "chronoedit": Tiny(needs="ChronoEditTransformer3DModel", make=chronoedit, inputs=wan_inputs, num_attention=2),
    "cosmos": Tiny(needs="CosmosTransformer3DModel", make=cosmos, inputs=cosmos_inputs, num_attention=2),
    "kandinsky5": Tiny(
        needs="Kandinsky5Transformer3DModel", make=kandinsky5, inputs=kandinsky5_inputs, num_attention=2
    ),
}
