"""The model families, one row each: how `linearize_` finds the image's self-attention and its token grid."""

from dataclasses import replace
from typing import Any, cast

from torch import nn

from ..errors import UnsupportedModelError, did_you_mean
from .family import Family as Family
from .family import ForwardLayout as ForwardLayout
from .latents import (
    level_tokens,
    read_auraflow,
    read_channels_last,
    read_ernie_image,
    read_feature_map,
    read_glm_image,
    read_hidream,
    read_hunyuan_image,
    read_items,
    read_latents,
    read_latents_and_text,
    read_sd3,
    read_square_latents,
)
from .positions import (
    read_flux2,
    read_flux3,
    read_flux_controlnet,
    read_image_ids,
    read_image_ids_and_mask,
    read_indicator,
    read_joint_position_ids,
)
from .refused import REFUSED
from .sequences import (
    read_bria_fibo2,
    read_image_shapes,
    read_image_shapes_last,
    read_lumina,
    read_shape_list,
    read_z_image,
)

_FLUX = Family(
    name="flux",
    attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    read_layout=read_image_ids,
    blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
)


def _flux_like_family(name: str, classes: str) -> Family:
    """A relative of FLUX with the same module names, whose own classes begin with `classes`."""
    return replace(_FLUX, name=name, blocks=(f"{classes}TransformerBlock", f"{classes}SingleTransformerBlock"))


_SD3 = Family(
    name="sd3",
    attention=("transformer_blocks.*.attn", "transformer_blocks.*.attn2"),
    read_layout=read_sd3,
    text_first=False,
    image_alone=("*.attn2",),
    blocks=("JointTransformerBlock", "SD3SingleTransformerBlock"),
)
_SD_UNET = Family(
    name="sd-unet",
    attention=("*.transformer_blocks.*.attn1", "*.transformer_blocks.*.attn2"),
    read_layout=read_feature_map,
    layout_at="Transformer2DModel",
    image_alone=("*",),
    blocks=("BasicTransformerBlock",),
    native_tokens=level_tokens,
)


def _image_only_family(name: str, attention: str, block: str) -> Family:
    """A family that takes latents as an image and has self-attention of the image alone."""
    return Family(name=name, attention=(attention,), read_layout=read_latents, image_alone=("*",), blocks=(block,))


_HUNYUAN_DIT = _image_only_family("hunyuan-dit", "blocks.*.attn1", "HunyuanDiTBlock")
_QWEN_IMAGE = Family(
    name="qwen-image",
    attention=("transformer_blocks.*.attn",),
    read_layout=read_image_shapes,
    blocks=("QwenImageTransformerBlock",),
)
_WAN = _image_only_family("wan", "blocks.*.attn1", "WanTransformerBlock")

FAMILIES: dict[str, Family] = {
    "FluxTransformer2DModel": _FLUX,
    "FluxControlNetModel": replace(_FLUX, read_layout=read_flux_controlnet),
    "Flux2Transformer2DModel": replace(_flux_like_family("flux2", "Flux2"), read_layout=read_flux2),
    "Flux3Transformer2DModel": Family(
        name="flux3",
        attention=("mode_blocks.image.*.attn", "single_transformer_blocks.*.attn"),
        read_layout=read_flux3,
        image_alone=("mode_blocks.*",),
        blocks=("Flux3ModeTransformerBlock", "Flux3SingleTransformerBlock"),
    ),
    "BriaTransformer2DModel": _flux_like_family("bria", "Bria"),
    "BriaFiboTransformer2DModel": _flux_like_family("bria-fibo", "BriaFibo"),
    "BriaFibo2Transformer2DModel": Family(
        name="bria-fibo2",
        attention=("layers.*.attention", "noise_refiner.*.attention"),
        read_layout=read_bria_fibo2,
        text_first=False,
        blocks=("BriaFibo2TransformerBlock",),
    ),
    "LongCatImageTransformer2DModel": _flux_like_family("longcat-image", "LongCatImage"),
    "OvisImageTransformer2DModel": _flux_like_family("ovis-image", "OvisImage"),
    "Krea2Transformer2DModel": Family(
        name="krea2",
        attention=("transformer_blocks.*.attn",),
        read_layout=read_joint_position_ids,
        blocks=("Krea2TransformerBlock",),
    ),
    "Ideogram4Transformer2DModel": Family(
        name="ideogram4",
        attention=("layers.*.attention",),
        read_layout=read_indicator,
        blocks=("Ideogram4TransformerBlock",),
        masked_at=("Ideogram4TransformerBlock",),
    ),
    "ChromaTransformer2DModel": Family(
        name="chroma",
        attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        read_layout=read_image_ids_and_mask,
        blocks=("ChromaTransformerBlock", "ChromaSingleTransformerBlock"),
        masked_at=("ChromaTransformerBlock", "ChromaSingleTransformerBlock"),
    ),
    "SD3Transformer2DModel": _SD3,
    "SD3ControlNetModel": _SD3,
    "PixArtTransformer2DModel": _image_only_family("pixart", "transformer_blocks.*.attn1", "BasicTransformerBlock"),
    "DiTTransformer2DModel": replace(
        _image_only_family("dit", "transformer_blocks.*.attn1", "BasicTransformerBlock"),
        read_layout=read_square_latents,
    ),
    "UNet2DConditionModel": _SD_UNET,
    "ControlNetModel": _SD_UNET,
    "ControlNetUnionModel": _SD_UNET,
    "UNetControlNetXSModel": _SD_UNET,
    "AuraFlowTransformer2DModel": Family(
        name="auraflow",
        attention=("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        read_layout=read_auraflow,
        blocks=("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"),
    ),
    "HunyuanDiT2DModel": _HUNYUAN_DIT,
    "HunyuanDiT2DControlNetModel": _HUNYUAN_DIT,
    "HunyuanImageTransformer2DModel": Family(
        name="hunyuan-image",
        attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        read_layout=read_hunyuan_image,
        text_first=False,
        blocks=("HunyuanImageTransformerBlock", "HunyuanImageSingleTransformerBlock"),
    ),
    "Lumina2Transformer2DModel": Family(
        name="lumina2",
        attention=("layers.*.attn", "noise_refiner.*.attn"),
        read_layout=read_lumina,
        image_alone=("noise_refiner.*",),
        blocks=("Lumina2TransformerBlock",),
    ),
    "QwenImageTransformer2DModel": _QWEN_IMAGE,
    "QwenImageControlNetModel": _QWEN_IMAGE,
    "QwenImage21Transformer2DModel": Family(
        name="qwen-image-21",
        attention=("transformer_blocks.*.attn",),
        read_layout=read_image_shapes_last,
        text_queries=False,
        blocks=("QwenImage21TransformerBlock",),
    ),
    "ZImageTransformer2DModel": Family(
        name="z-image",
        attention=("layers.*.attention", "noise_refiner.*.attention"),
        read_layout=read_z_image,
        text_first=False,
        blocks=("ZImageTransformerBlock",),
    ),
    "CogView4Transformer2DModel": Family(
        name="cogview4",
        attention=("transformer_blocks.*.attn1",),
        read_layout=read_latents_and_text,
        blocks=("CogView4TransformerBlock",),
    ),
    "CogView3PlusTransformer2DModel": Family(
        name="cogview3-plus",
        attention=("transformer_blocks.*.attn1",),
        read_layout=read_latents_and_text,
        blocks=("CogView3PlusTransformerBlock",),
    ),
    "GlmImageTransformer2DModel": Family(
        name="glm-image",
        attention=("transformer_blocks.*.attn1",),
        read_layout=read_glm_image,
        blocks=("GlmImageTransformerBlock",),
    ),
    "ErnieImageTransformer2DModel": Family(
        name="ernie-image",
        attention=("layers.*.self_attention",),
        read_layout=read_ernie_image,
        text_first=False,
        blocks=("ErnieImageSharedAdaLNBlock",),
    ),
    "HiDreamImageTransformer2DModel": Family(
        name="hidream",
        attention=("double_stream_blocks.*.attn1", "single_stream_blocks.*.attn1"),
        read_layout=read_hidream,
        text_first=False,
        blocks=("HiDreamBlock",),
    ),
    "JoyImageEditTransformer3DModel": Family(
        name="joy-image",
        attention=("double_blocks.*.attn",),
        read_layout=read_items,
        text_first=False,
        blocks=("JoyImageTransformerBlock",),
    ),
    "JoyImageEditPlusTransformer3DModel": Family(
        name="joy-image-plus",
        attention=("double_blocks.*.attn",),
        read_layout=read_shape_list,
        text_first=False,
        blocks=("JoyImageEditPlusTransformerBlock",),
    ),
    "Kandinsky5Transformer3DModel": replace(
        _image_only_family(
            "kandinsky5", "visual_transformer_blocks.*.self_attention", "Kandinsky5TransformerDecoderBlock"
        ),
        read_layout=read_channels_last,
    ),
    "CosmosTransformer3DModel": _image_only_family("cosmos", "transformer_blocks.*.attn1", "CosmosTransformerBlock"),
    "LuminaNextDiT2DModel": _image_only_family("lumina-next", "layers.*.attn1", "LuminaNextDiTBlock"),
    "NucleusMoEImageTransformer2DModel": Family(
        name="nucleus-image",
        attention=("transformer_blocks.*.attn",),
        read_layout=read_image_shapes,
        text_first=False,
        text_queries=False,
        blocks=("NucleusMoEImageTransformerBlock",),
    ),
    "PRXTransformer2DModel": Family(
        name="prx",
        attention=("blocks.*.attention",),
        read_layout=read_latents_and_text,
        text_queries=False,
        blocks=("PRXBlock",),
    ),
    "WanTransformer3DModel": _WAN,
    "ChronoEditTransformer3DModel": replace(_WAN, name="chronoedit"),
    "WanVACETransformer3DModel": replace(
        _WAN,
        attention=("blocks.*.attn1", "vace_blocks.*.attn1"),
        blocks=("WanTransformerBlock", "WanVACETransformerBlock"),
    ),
}


def family_of(model: nn.Module) -> Family:
    """The family that a model was converted with; else that of its class or of a class it derives from.

    Raises:
        UnsupportedModelError: there is none; the error says why, or lists the supported classes.
    """
    if hasattr(model, "_lineardit_conversion"):
        return cast(Any, model)._lineardit_conversion.family
    for cls in type(model).__mro__:
        if cls.__name__ in REFUSED:
            break
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise UnsupportedModelError(unsupported(type(model).__name__))


def unsupported(class_name: str) -> str:
    """Why a model of this class cannot be converted, in a sentence."""
    if class_name in REFUSED:
        return f"a {class_name} {REFUSED[class_name]}"
    return (
        f"cannot convert a {class_name}{did_you_mean(class_name, FAMILIES)}; supported: {', '.join(FAMILIES)}; "
        "for a custom model pass linearize_(..., family=Family(...))"
    )
