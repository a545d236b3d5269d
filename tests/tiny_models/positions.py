"""Models that take the position of every token as input."""

import torch
from torch import Tensor

from .tiny import Arguments, Grid, Tiny


def position_ids(grid: Grid, *, dtype: torch.dtype = torch.float32, offset: int = 0, axes: int = 3) -> Tensor:
    """[height * width, axes]: row and column in columns 1 and 2, else zero."""
    rows, cols = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    zeros = torch.zeros_like(rows)
    ids = torch.stack([zeros, rows + offset, cols + offset, *[zeros] * (axes - 3)], dim=-1).flatten(0, 1)
    return ids.to(dtype)


def flux3_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """With a reference of 2 x 3 tokens."""
    reference = position_ids((2, 3), axes=4)
    reference[:, 0] = 10
    return {"image_cond_hidden_states": torch.randn(batch, 6, 4), "image_cond_ids": reference}


def chroma_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """The last text token of the second sample is padding."""
    mask = torch.ones(batch, text_len + grid[0] * grid[1], dtype=torch.bool)
    mask[1:, text_len - 1] = False
    return {"attention_mask": mask}


def bria_fibo_inputs(grid: Grid, text_len: int, batch: int) -> Arguments:
    """The last text token of the second sample is padding, masked as query and as key, as its pipeline does."""
    attend = chroma_inputs(grid, text_len, batch)["attention_mask"]
    pairs = attend[:, None, :, None] & attend[:, None, None, :]
    return {"joint_attention_kwargs": {"attention_mask": torch.where(pairs, 0.0, -torch.inf)}}


POSITIONS = {
    "flux": Tiny(needs="FluxTransformer2DModel"),
    "flux2": Tiny(needs="Flux2Transformer2DModel", config={"axes_dims_rope": (4, 4, 4, 4)}),
    "flux3": Tiny(
        needs="Flux3Transformer2DModel",
        config={"axes_dims_rope": (4, 4, 4, 4), "cond_in_channels": 4},
        inputs=flux3_inputs,
    ),
    "ideogram4": Tiny(
        needs="Ideogram4Transformer2DModel",
        config={"adaln_dim": 16, "llm_features_dim": 16, "mrope_section": (4, 2, 2)},
    ),
    "chroma": Tiny(
        needs="ChromaTransformer2DModel",
        config={"approximator_hidden_dim": 16, "approximator_layers": 1, "approximator_num_channels": 8},
        inputs=chroma_inputs,
    ),
    "bria": Tiny(needs="BriaTransformer2DModel"),
    "bria-fibo": Tiny(needs="BriaFiboTransformer2DModel", config={"text_encoder_dim": 16}, inputs=bria_fibo_inputs),
    "longcat-image": Tiny(needs="LongCatImageTransformer2DModel"),
    "ovis-image": Tiny(needs="OvisImageTransformer2DModel"),
    "krea2": Tiny(
        needs="Krea2Transformer2DModel",
        config={
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "num_text_layers": 2,
            "text_hidden_dim": 16,
            "text_intermediate_size": 16,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
        },
    ),
}
