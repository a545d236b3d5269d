"""ControlNets, whose own attention is as costly as that of the model they steer."""

from .latents import UNET, unet_inputs
from .sequences import QWEN_IMAGE, qwen_image_inputs
from .tiny import Tiny

CONTROLNETS = {
    "flux-controlnet": Tiny(needs="FluxControlNetModel"),
    "sd3-controlnet": Tiny(needs="SD3ControlNetModel"),
    "unet-controlnet": Tiny(
        needs="ControlNetModel",
        config=UNET | {"conditioning_embedding_out_channels": (8, 8)},
        inputs=unet_inputs,
        num_attention=3,
    ),
    "hunyuan-dit-controlnet": Tiny(
        needs="HunyuanDiT2DControlNetModel", config={"patch_size": 2, "transformer_num_layers": 6}
    ),
    "qwen-image-controlnet": Tiny(needs="QwenImageControlNetModel", config=QWEN_IMAGE, inputs=qwen_image_inputs),
}
