"""Plain diffusers: FLUX's pipelines make image positions in the dtype of the text; bfloat16 merges neighbours.

    python examples/bf16_positions.py

bfloat16 has 8 significant bits: integers are exact up to 256, so that 257 becomes 256 and 259 becomes 260. A token of
FLUX.1 is 16 pixels wide: beyond 4096 pixels a side, neighbours share one position and its rotary embedding.
"""

import torch
from diffusers import FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

pos_embed = FluxPosEmbed(theta=10000, axes_dim=[16, 56, 56])  # as in FLUX.1
print("pixels a side   rows of tokens   distinct in float32   distinct in bfloat16   distinct rotary embeddings")
for side in (2048, 4096, 5120, 6144, 8192):
    rows = side // 16
    distinct = []
    for dtype in (torch.float32, torch.bfloat16):
        ids = FluxPipeline._prepare_latent_image_ids(1, rows, 1, "cpu", dtype)  # as FluxPipeline.__call__ does
        distinct.append(len(ids[:, 1].unique()))
    cos, sin = pos_embed(ids)
    embeddings = len(torch.cat([cos, sin], dim=1).unique(dim=0))
    print(f"{side:13}   {rows:14}   {distinct[0]:19}   {distinct[1]:20}   {embeddings:26}")
print("positions of rows 254 to 264 in bfloat16:", torch.arange(254, 265).bfloat16().int().tolist())
