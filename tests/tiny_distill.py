"""A FLUX pipeline of two blocks with random weights, and prompts for it."""

from diffusers import FluxPipeline, FluxTransformer2DModel

from lineardit.examples.tiny_flux.model import build_pipeline

PROMPTS = [
    f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square", "triangle", "cross")
]
SIZES = ((24, 32), (32, 24))  # pixels; a token is 4 x 4


def build_tiny(*, guidance_embeds: bool = False) -> FluxPipeline:
    pipe = build_pipeline(0)
    pipe.register_modules(
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=128,
            pooled_projection_dim=64,
            axes_dims_rope=(4, 6, 6),
            guidance_embeds=guidance_embeds,
        ).eval()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
