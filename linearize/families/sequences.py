"""Models that pack text and images of given lengths into one sequence: Qwen-Image, Lumina 2, Z-Image, ...

B batch, C channels.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor, nn

from ..errors import LayoutError
from ..layout import Grid
from .family import ForwardLayout

Shape = tuple[int, int, int]  # (frames, height, width) in tokens


def read_image_shapes(model: Any, arguments: Mapping[str, Any]) -> ForwardLayout:
    """Qwen-Image: img_shapes has the (frames, height, width) of each sample's images; the first one is generated.

    The images after it are references. Layered models generate all images, of one size: here they are frames.
    """
    shapes = _common_shapes(arguments["img_shapes"])
    text_len = arguments["encoder_hidden_states"].shape[1]
    tokens = arguments["hidden_states"].shape[1]
    if sum(map(prod, shapes)) != tokens:
        raise LayoutError(
            f"hidden_states has {tokens} image tokens, but img_shapes has {shapes}: make both from the same size"
        )
    if getattr(model.config, "use_layer3d_rope", False) and len(set(shapes)) == 1:
        return ForwardLayout(grid=(len(shapes) * shapes[0][0], *shapes[0][1:]), text_lens=(text_len,))
    num_references = tokens - prod(shapes[0])
    return ForwardLayout(
        grid=_without_single_frame(shapes[0]),
        text_lens=(text_len + num_references,),
        image_starts=(text_len,) if num_references else None,
    )


def read_image_shapes_last(model: nn.Module, arguments: Mapping[str, Any]) -> ForwardLayout:
    """Qwen-Image 2.1: img_shapes as above, with the generated image last; tokens before it do not attend to it.

    img_mask [B, slots] is True for slots of images, each of 2 x 2 tokens, and False for slots of text, each of one.
    """
    shape = _common_shapes(arguments["img_shapes"])[-1]
    slots = arguments["img_mask"][0]
    num_tokens = slots.shape[0] + 3 * int(slots.sum())
    return ForwardLayout(grid=_without_single_frame(shape), text_lens=(num_tokens - prod(shape),))


def read_shape_list(model: nn.Module, arguments: Mapping[str, Any]) -> ForwardLayout:
    """JoyImage Edit Plus: hidden_states [B, N, ...] of the image, its references and padding; the text after them."""
    shape = _common_shapes(arguments["shape_list"])[0]
    num_tokens = arguments["hidden_states"].shape[1] + arguments["encoder_hidden_states"].shape[1]
    return ForwardLayout(grid=_without_single_frame(shape), text_lens=(num_tokens - prod(shape),))


def _common_shapes(img_shapes: Sequence[Any]) -> list[Shape]:
    """The shapes of one sample's images, which all samples must share."""
    samples = [[sample] if isinstance(sample[0], int) else list(sample) for sample in img_shapes]
    if any(sample != samples[0] for sample in samples):
        raise LayoutError(
            f"every image of a batch must have the same size, got the shapes {img_shapes}: run them one by one"
        )
    return [(int(frames), int(height), int(width)) for frames, height, width in samples[0]]


def _without_single_frame(shape: Shape) -> Grid:
    return shape[1:] if shape[0] == 1 else shape


def _patches(patch_size: int, latents: Tensor) -> Grid:
    """(height, width) in tokens of latents [B, C, height, width]."""
    return tuple(side // patch_size for side in latents.shape[-2:])


def read_lumina(model: Any, arguments: Mapping[str, Any]) -> ForwardLayout:
    """Lumina 2: latents [B, C, height, width]; each sample is its text, then the image, then padding."""
    grid = _patches(model.config.patch_size, arguments["hidden_states"])
    _check_axes(model, grid, model.config.axes_lens[1:])
    lengths = [int(length) for length in arguments["encoder_attention_mask"].sum(1).tolist()]
    return ForwardLayout(grid=grid, text_lens=(max(lengths),), image_starts=tuple(lengths))


def read_bria_fibo2(model: Any, arguments: Mapping[str, Any]) -> ForwardLayout:
    """Bria Fibo 2: latents [B, C, height, width], references, and gist tokens in place of the text.

    The gist is before the image, or after the references if the samples' gists differ in length.
    """
    from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count  # not in older versions

    config, text = model.config, arguments["encoder_hidden_states"]  # [B, layers, text, C]
    grid = _patches(config.patch_size, arguments["hidden_states"])
    _check_axes(model, grid, config.axes_lens[1:])
    mask = arguments.get("encoder_attention_mask")
    gists = compute_gist_count(
        [text.shape[2]] * text.shape[0] if mask is None else mask.sum(1).tolist(),
        config.min_num_gist_tokens,
        config.max_num_gist_tokens,
        config.gist_step,
        config.gist_min_text_len,
        config.gist_max_text_len,
    )
    references = arguments.get("context_latents") or ()
    num_references = sum(prod(_patches(config.patch_size, latents)) for latents in references)
    return ForwardLayout(
        grid=grid,
        text_lens=(num_references, num_references + max(gists)),
        image_starts=(gists[0] if len(set(gists)) == 1 else 0,),
    )


def read_z_image(model: Any, arguments: Mapping[str, Any]) -> ForwardLayout:
    """Z-Image: a list of latents [C, frames, height, width]; the image, padded to a multiple, then the text, padded.

    In omni mode, each sample has a list of texts and a list of images, and all of its texts come first.
    """
    latents, texts = arguments["x"], arguments["cap_feats"]
    omni = isinstance(latents[0], list)
    if omni:
        if any(len(sample) > 1 for sample in latents):
            raise LayoutError(
                "several images in one sequence (Z-Image's omni mode) are not supported yet: run this call inside "
                "`with dense(model):`, or restore_ the model"
            )
        latents = [image for (image,) in latents]
    sizes = {tuple(latent.shape[-3:]) for latent in latents}
    if len(sizes) > 1:
        raise LayoutError(f"every image of a batch must have the same size, got {sorted(sizes)}: run them one by one")
    frames, height, width = sizes.pop()
    patch, frame_patch = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    shape = (frames // frame_patch, height // patch, width // patch)
    _check_axes(model, shape, (model.config.axes_lens[0], *model.config.axes_lens[1:]))
    padding = -prod(shape) % _SEQUENCE_MULTIPLE
    texts_of_samples = texts if omni else [[text] for text in texts]
    lengths = tuple(sum(len(text) + -len(text) % _SEQUENCE_MULTIPLE for text in sample) for sample in texts_of_samples)
    return ForwardLayout(
        grid=_without_single_frame(shape),
        text_lens=(padding, padding + max(lengths)),
        image_starts=lengths if omni else None,
    )


_SEQUENCE_MULTIPLE = 32  # SEQ_MULTI_OF of diffusers' transformer_z_image


def _check_axes(model: nn.Module, grid: Grid, limits: Sequence[int]) -> None:
    """Raise a LayoutError if a side has more tokens than the model has positions."""
    if any(side > limit for side, limit in zip(grid, limits, strict=True)):
        raise LayoutError(
            f"this {type(model).__name__} has positions for up to {tuple(limits)} tokens (axes_lens), got "
            f"{tuple(grid)}: choose a smaller image"
        )
