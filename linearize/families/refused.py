"""Image models of diffusers that are not supported, and why: what `UnsupportedModelError` says."""

_LINEAR_ALREADY = "has linear self-attention already: nothing to convert"

# wrappers that pipelines make from a list of ControlNets
MULTI_CONTROLNETS = (
    "FluxMultiControlNetModel",
    "HunyuanDiT2DMultiControlNetModel",
    "MultiControlNetModel",
    "MultiControlNetUnionModel",
    "QwenImageMultiControlNetModel",
    "SD3MultiControlNetModel",
)
_SEVERAL_NETWORKS = "holds several networks: convert each one of its `nets`"

REFUSED = {
    **dict.fromkeys(MULTI_CONTROLNETS, _SEVERAL_NETWORKS),
    "SanaTransformer2DModel": _LINEAR_ALREADY,
    "SanaControlNetModel": _LINEAR_ALREADY,
    "SanaVideoTransformer3DModel": _LINEAR_ALREADY,
    "OmniGenTransformer2DModel": (
        "lets each text token see those before it only, and tells so by a mask of tokens x tokens, for which there is "
        "no linear attention yet"
    ),
    "DreamLiteUNetModel": (
        "has picture and reference side by side in one image, where a window would hide the reference; it attends at "
        "its smallest level only"
    ),
    "Kandinsky3UNet": "has its self-attention marked as cross-attention by diffusers, so that it cannot be told apart",
    "StableCascadeUNet": "attends to image and text from unlike layers, which is not supported yet",
    "UVit2DModel": "makes pictures of 256 or 512 pixels only, where attention is cheap",
    "ZImageControlNetModel": (
        "shares the refiner of its transformer, which is told one grid for both: convert the transformer with "
        'layers="layers.*" to run it beside this'
    ),
}
