"""The arguments of one denoising step on one picture, for counting its operations or timing it."""

import inspect
from typing import Any

from torch import nn

from .named_inputs import KNOWN, argument_names, inputs_by_name, patch_of

# Text tokens of a prompt in a family's pipelines; in all others 512, or what the config says.
_TEXT = {
    "sd3": 77 + 256,
    "pixart": 300,
    "sd-unet": 77,
    "auraflow": 256,
    "hunyuan-image": 1000,
    "lumina2": 256,
    "lumina-next": 256,
    "cogview4": 1024,
    "cogview3-plus": 224,
    "bria": 128,
    "bria-fibo2": 4096,
    "ovis-image": 256,
    "prx": 256,
    "ideogram4": 2048,
    "joy-image": 1024,
    "joy-image-plus": 1024,
}
# HiDream and NucleusMoE route experts by values; ERNIE calls autocast for its device, which cannot be "meta"; the
# config of ControlNet-XS does not give its input channels.
_UNCOUNTED = (
    "HiDreamImageTransformer2DModel",
    "NucleusMoEImageTransformer2DModel",
    "ErnieImageTransformer2DModel",
    "UNetControlNetXSModel",
)


def can_make_inputs(model: nn.Module) -> bool:
    """Whether `step_inputs` knows every argument that this model needs, and its forward runs on the meta device."""
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    return type(model).__name__ not in _UNCOUNTED and KNOWN.issuperset(needed)


def step_inputs(model: Any, family: str, latents: tuple[int, int], *, text_len: int | None = None) -> dict[str, Any]:
    """Arguments of a forward for one picture; floats are meta tensors.

    Args:
        family: Name of the model's family.
        latents: (height, width) of the picture in the VAE's latents, before any packing into tokens.
        text_len: Text tokens, unless the config sets it; None: as in the family's pipelines.
    """
    token = token_side(model)
    grid = (latents[0] // token, latents[1] // token)
    return inputs_by_name(type(model), model.config, grid, text_len=text_len or _TEXT.get(family, 512))


def token_side(model: Any) -> int:
    """VAE latents per token, along one side; 1 for a UNet."""
    names = argument_names(type(model))
    if "sample" in names:
        return 1
    packed = 2 if "img_ids" in names or "position_ids" in names else 1
    return packed * patch_of(model.config, names)
