"""Guidance by perturbed attention: which kinds work with linear attention, and which are refused."""

from typing import Any

from torch.overrides import _get_current_function_mode_stack

from ..errors import LayoutError

_SKIPS_SCORES = "AttentionScoreSkipFunctionMode"  # diffusers.hooks.layer_skip
# SD3's processors in diffusers' PAG pipelines; those of UNets and Hunyuan-DiT return the values unweighted, and work
_MASKS_TOKENS = ("PAGJointAttnProcessor2_0", "PAGCFGJointAttnProcessor2_0")


def skips_scores() -> bool:
    """Whether a LayerSkipConfig perturbs this layer: attention returns the values and computes no scores."""
    return any(type(mode).__name__ == _SKIPS_SCORES for mode in _get_current_function_mode_stack())


def refuse_perturbed(name: str, processor: Any) -> None:
    """Raise a LayoutError if a processor perturbs attention with a tokens x tokens mask."""
    if type(processor).__name__ in _MASKS_TOKENS:
        raise LayoutError(
            f"{name} has {type(processor).__name__}: SD3's perturbed attention guidance needs a mask of tokens x "
            "tokens, which linear attention does not support. Keep the layers that it perturbs dense (linearize_(..., "
            "layers=[the others])), or call StableDiffusion3Pipeline with skip_guidance_layers=[...] instead, or run "
            "this call inside `with dense(pipe):`. After such an error diffusers leaves its processors in the model: "
            "pipe.transformer.set_attn_processor(JointAttnProcessor2_0()) removes them"
        )
