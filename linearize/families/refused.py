"""Image models of diffusers that are not supported, and why: what `UnsupportedModelError` says."""

_LINEAR_ALREADY = "already has linear self-attention: nothing to convert"

# wrappers that pipelines make from a list of ControlNets
MULTI_CONTROLNETS = (
    "FluxMultiControlNetModel",
    "HunyuanDiT2DMultiControlNetModel",
    "MultiControlNetModel",
    "MultiControlNetUnionModel",
    "QwenImageMultiControlNetModel",
    "SD3MultiControlNetModel",
)
_SEVERAL_NETWORKS = "contains several networks: convert each of its `nets`"

REFUSED = {
    **dict.fromkeys(MULTI_CONTROLNETS, _SEVERAL_NETWORKS),
    "SanaTransformer2DModel": _LINEAR_ALREADY,
    "SanaControlNetModel": _LINEAR_ALREADY,
    "SanaVideoTransformer3DModel": _LINEAR_ALREADY,
    "OmniGenTransformer2DModel": (
        "has causal attention over text tokens, given by a mask of tokens x tokens, which linear attention does not "
        "support yet"
    ),
    "DreamLiteUNetModel": (
        "places image and reference side by side in one canvas, where a window would hide the reference; it has "
        "attention at its smallest level only"
    ),
    "Kandinsky3UNet": "has self-attention that diffusers marks as cross-attention, so the two cannot be distinguished",
    "StableCascadeUNet": "attends to image and text tokens that come from different layers, which is not supported yet",
    "UVit2DModel": "generates images of 256 or 512 pixels only, where attention is cheap",
    "ZImageControlNetModel": (
        "shares the refiner of its transformer, which can have only one token grid: convert the transformer with "
        'layers="layers.*" to use it with this ControlNet'
    ),
}
