"""Models that take latents as an image or a video, with self-attention of the image only."""

import torch

from .tiny import Arguments, Grid, Tiny


def latents(grid: Grid, batch: int) -> torch.Tensor:
    """Two by two latents for each token."""
    return torch.randn(batch, 4, 2 * grid[0], 2 * grid[1])


def dit_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """A square of the grid's longer side: DiT takes no other shape."""
    return {"hidden_states": latents((max(grid), max(grid)), batch)}


def unet_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """One timestep for all samples."""
    return {"timestep": torch.tensor(5)}


def wan_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """Two frames."""
    return {"hidden_states": torch.randn(batch, 4, 2, 2 * grid[0], 2 * grid[1])}


UNET = {
    "attention_head_dim": 2,  # the number of heads
    "num_attention_heads": None,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "layers_per_block": 1,
}
WAN = {"attention_head_dim": 12, "rope_max_seq_len": 32}

LATENTS = {
    "pixart": Tiny(needs="PixArtTransformer2DModel", config={"out_channels": 8, "use_additional_conditions": False}),
    "dit": Tiny(needs="DiTTransformer2DModel", config={"out_channels": 8, "num_embeds_ada_norm": 8}, inputs=dit_inputs),
    "unet": Tiny(
        needs="UNet2DConditionModel",
        config=UNET | {"up_block_types": ("CrossAttnUpBlock2D",) * 2},
        inputs=unet_inputs,
        num_attention=7,
    ),
    "hunyuan-dit": Tiny(needs="HunyuanDiT2DModel", config={"num_layers": 4, "patch_size": 2}, num_attention=4),
    "lumina-next": Tiny(needs="LuminaNextDiT2DModel", config={"learn_sigma": False}),
    "wan": Tiny(needs="WanTransformer3DModel", config=WAN, inputs=wan_inputs),
    "chronoedit": Tiny(needs="ChronoEditTransformer3DModel", config=WAN, inputs=wan_inputs),
    "cosmos": Tiny(
        needs="CosmosTransformer3DModel",
        config={
            "adaln_lora_dim": 4,
            "concat_padding_mask": False,
            "extra_pos_embed_type": None,
            "max_size": (4, 64, 64),
            "rope_scale": (1.0, 1.0, 1.0),
        },
    ),
    "kandinsky5": Tiny(
        needs="Kandinsky5Transformer3DModel",
        config={
            "ff_dim": 32,
            "in_text_dim": 16,
            "in_text_dim2": 16,
            "in_visual_dim": 4,
            "model_dim": 32,
            "num_text_blocks": 1,
            "out_visual_dim": 4,
            "time_dim": 16,
        },
    ),
}
