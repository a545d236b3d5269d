"""Generates the arguments of a denoiser's forward by their names, which diffusers' models share.

B batch, N image tokens. Floats are meta tensors; position ids, masks and lengths have values.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_TEXT_WIDTHS = (
    "encoder_hid_dim",
    "joint_attention_dim",
    "caption_channels",
    "text_embed_dim",
    "text_dim",
    "cap_feat_dim",
    "context_in_dim",
    "in_text_dim",
    "llm_features_dim",
    "cross_attention_dim",
)
_SEQUENCES = ("img_ids", "img_shapes", "position_ids")  # a forward with one of these takes tokens, not an image


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Pictures of one size for one model.

    Attributes:
        config: The model's.
        names: Names of the arguments of the model's forward.
        grid: (height, width) in tokens; for a UNet, in latents.
        text: Number of text tokens.
        batch: Number of pictures.
    """

    config: Mapping[str, Any]
    names: tuple[str, ...]
    grid: tuple[int, int]
    text: int
    batch: int

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def latents(self) -> tuple[int, int]:
        """Height and width of the model's input, where it is an image."""
        patch = 1 if "sample" in self.names else patch_of(self.config, self.names)
        return self.grid[0] * patch, self.grid[1] * patch

    def first(self, *keys: str) -> Any:
        """The first of these config entries that is not None."""
        return next((self.config[key] for key in keys if self.config.get(key) is not None), None)

    @property
    def channels(self) -> int:
        return int(self.first("in_channels", "in_visual_dim"))

    def floats(self, *shape: int) -> Tensor:
        """[B, *shape]."""
        return torch.empty(self.batch, *shape, device="meta")

    def ids(self, axes: int) -> Tensor:
        """[N, axes]: row and column in columns 1 and 2."""
        ids = torch.zeros(*self.grid, axes)
        ids[..., 1] = torch.arange(self.grid[0])[:, None]
        ids[..., 2] = torch.arange(self.grid[1])
        return ids.flatten(0, 1)


def inputs_by_name(
    model_class: Any,
    config: Mapping[str, Any],
    grid: tuple[int, int],
    *,
    text_len: int,
    batch: int = 1,
    omit: Collection[str] = (),
) -> dict[str, Any]:
    """Generate those arguments of a forward whose names are known.

    Args:
        grid: (height, width) of the picture in tokens; for a UNet, in latents.
        text_len: Number of text tokens, unless the config sets it.
        omit: Names of arguments to omit.
    """
    names = argument_names(model_class)
    text = config.get("text_len") or text_len
    picture = Picture(config=config, names=names, grid=grid, text=text, batch=batch)
    inputs = {name: _MAKERS[name](picture) for name in names if name in _MAKERS and name not in omit}
    return {name: value for name, value in inputs.items() if value is not None}


def with_values(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """One of these arguments on a device; meta floats get values of this dtype: 0.5 in vectors, else random."""
    if not value.is_meta:
        return value.to(device)
    dtype = value.dtype if value.is_complex() else dtype
    if value.ndim == 1:  # a timestep or guidance scale; 0.5 is exact in bfloat16
        return torch.full(value.shape, 0.5, dtype=dtype, device=device)
    return torch.randn(value.shape, dtype=dtype, device=device)


def argument_names(model_class: Any) -> tuple[str, ...]:
    """Names of the arguments of a class's forward."""
    return tuple(inspect.signature(model_class.forward).parameters)[1:]


def patch_of(config: Mapping[str, Any], names: Sequence[str]) -> int:
    """Latents per token, along one side."""
    patch = config.get("patch_size") or (1 if _is_sequence(names) else 2)
    return patch if isinstance(patch, int) else patch[-1]


def _is_sequence(names: Sequence[str]) -> bool:
    return any(name in names for name in _SEQUENCES)


def _image(picture: Picture) -> Tensor:
    sides, channels = picture.latents, picture.channels
    patch: Any = picture.config.get("patch_size")
    if "shape_list" in picture.names:
        return picture.floats(picture.tokens, channels, *patch)
    if "indicator" in picture.names:
        return picture.floats(picture.text + picture.tokens, channels)
    if _is_sequence(picture.names):
        return picture.floats(picture.tokens, channels)
    if "visual_rope_pos" in picture.names:
        return picture.floats(1, *sides, channels)
    frames = (1,) if isinstance(patch, (list, tuple)) and len(patch) == 3 else ()
    return picture.floats(channels, *frames, *sides)


def _text(picture: Picture) -> Tensor | None:
    width = picture.first(*_TEXT_WIDTHS)
    if picture.config.get("use_crossattn_projection"):
        width = picture.config["crossattn_proj_in_channels"]
    if "indicator" in picture.names:
        return picture.floats(picture.text + picture.tokens, width)
    if "text_hidden_dim" in picture.config:
        return picture.floats(picture.text, picture.config["num_text_layers"], picture.config["text_hidden_dim"])
    if "injection_layer_ids" in picture.config:
        return picture.floats(1 + len(picture.config["injection_layer_ids"]), picture.text, width)
    return picture.floats(picture.text, width)


def _pooled(picture: Picture) -> Tensor | None:
    width = picture.first("pooled_projection_dim", "in_text_dim2")
    return None if width is None else picture.floats(width)


def _control(picture: Picture) -> Tensor:
    """Latents like the image's; for a UNet, pixels."""
    if "sample" in picture.names:
        scale = 2 ** (len(picture.config["conditioning_embedding_out_channels"]) - 1)
        return picture.floats(picture.config["conditioning_channels"], *(scale * side for side in picture.latents))
    image = _image(picture)
    extra = picture.first("extra_conditioning_channels", "extra_condition_channels") or 0
    axis = 1 if image.ndim == 4 else 2
    return torch.empty([size + extra * (index == axis) for index, size in enumerate(image.shape)], device="meta")


def _position_ids(picture: Picture) -> Tensor:
    ids = torch.cat([torch.zeros(picture.text, 3), picture.ids(3)])
    return ids.long().repeat(picture.batch, 1, 1) if "indicator" in picture.names else ids


def _indicator(picture: Picture) -> Tensor:
    return torch.tensor([3] * picture.text + [2] * picture.tokens).repeat(picture.batch, 1)


def _added_conditions(picture: Picture) -> dict[str, Tensor]:
    if "sample" not in picture.names:
        return {"resolution": picture.floats(2), "aspect_ratio": picture.floats(1)}
    time_ids, width = 6, picture.config["projection_class_embeddings_input_dim"] or 0
    text_embeds = width - time_ids * (picture.config["addition_time_embed_dim"] or 0)
    return {"text_embeds": picture.floats(text_embeds), "time_ids": picture.floats(time_ids)}


def _rotary(picture: Picture) -> Any:
    if "hidden_size" in picture.config and "encoder_mask" in picture.names:  # Lumina-Next
        head_dim = picture.config["hidden_size"] // picture.config["num_attention_heads"]
        return torch.empty(*picture.grid, head_dim // 2, device="meta", dtype=torch.complex64)
    return (torch.empty(picture.tokens, picture.config["attention_head_dim"], device="meta"),) * 2


def _text_mask(picture: Picture) -> Tensor:
    """All texts but the first of a batch end with a token of padding."""
    mask = torch.ones(picture.batch, picture.text, dtype=torch.bool)
    mask[1:, -1] = False
    return mask


def _second_text_mask(picture: Picture) -> Tensor:
    return torch.ones(picture.batch, picture.first("text_len_t5") or 128, dtype=torch.bool)


def _image_slots(picture: Picture) -> Tensor:
    """Each slot of the image stands for 2 x 2 tokens."""
    slots = torch.arange(picture.text + picture.tokens // 4) >= picture.text
    return slots.repeat(picture.batch, 1)


def _pair(picture: Picture) -> Tensor:
    return picture.floats(2)


def _scalar(picture: Picture) -> Tensor:
    return picture.floats()


def _shapes(picture: Picture) -> list[list[tuple[int, int, int]]]:
    return [[(1, *picture.grid)]] * picture.batch


_MAKERS: dict[str, Callable[[Picture], Any]] = {
    "hidden_states": _image,
    "sample": _image,
    "x": lambda picture: [torch.empty(picture.channels, 1, *picture.latents, device="meta")] * picture.batch,
    "encoder_hidden_states": _text,
    "encoder_hidden_states_t5": lambda picture: picture.floats(
        picture.config["text_len_t5"], picture.config["cross_attention_dim_t5"]
    ),
    "encoder_hidden_states_2": lambda picture: (
        picture.floats(128, picture.config["text_embed_2_dim"]) if picture.config["text_embed_2_dim"] else None
    ),
    "cap_feats": lambda picture: (
        [torch.empty(picture.text, picture.config["cap_feat_dim"], device="meta")] * picture.batch
    ),
    "text_encoder_layers": lambda picture: (
        [picture.floats(picture.text, picture.config["text_encoder_dim"])]
        * (picture.config["num_layers"] + picture.config["num_single_layers"])
    ),
    "pooled_projections": _pooled,
    "controlnet_cond": _control,
    "controlnet_mode": lambda picture: (
        torch.zeros(picture.batch, 1, dtype=torch.long) if picture.config.get("num_mode") is not None else None
    ),
    "timestep": _scalar,
    "t": _scalar,
    "target_timestep": lambda picture: picture.floats() if picture.config.get("flow_map") else None,
    "guidance": lambda picture: picture.floats() if picture.config.get("guidance_embeds") else None,
    "img_ids": lambda picture: picture.ids(len(picture.config["axes_dims_rope"])),
    "txt_ids": lambda picture: torch.zeros(picture.text, len(picture.config["axes_dims_rope"])),
    "position_ids": _position_ids,
    "txt_seq_lens": lambda picture: [picture.text] * picture.batch,  # required by older versions of Qwen-Image
    "segment_ids": lambda picture: torch.ones(picture.batch, picture.text + picture.tokens, dtype=torch.long),
    "indicator": _indicator,
    "img_shapes": _shapes,
    "shape_list": _shapes,
    "img_mask": _image_slots,
    "image_rotary_emb": _rotary,
    "visual_rope_pos": lambda picture: [torch.arange(side) for side in (1, *picture.grid)],
    "text_rope_pos": lambda picture: torch.arange(picture.text),
    "encoder_attention_mask": lambda picture: _text_mask(picture) if "sample" not in picture.names else None,
    "encoder_attention_mask_2": lambda picture: (
        _second_text_mask(picture) if picture.config["text_embed_2_dim"] else None
    ),
    "encoder_mask": _text_mask,
    "text_embedding_mask": _text_mask,
    "text_embedding_mask_t5": _second_text_mask,
    "padding_mask": lambda picture: torch.empty(1, 1, *picture.latents, device="meta"),
    "added_cond_kwargs": _added_conditions,
    "cross_attention_kwargs": lambda picture: {},
    "class_labels": lambda picture: (
        torch.zeros(picture.batch, dtype=torch.long) if picture.config.get("num_embeds_ada_norm") else None
    ),
    "image_meta_size": lambda picture: picture.floats(6),
    "style": lambda picture: torch.zeros(picture.batch, dtype=torch.long),
    "original_size": _pair,
    "target_size": _pair,
    "crop_coords": _pair,
    "prior_token_id": lambda picture: torch.zeros(picture.batch, picture.tokens, dtype=torch.long),
    "prior_token_drop": lambda picture: torch.zeros(picture.batch, dtype=torch.bool),
}
KNOWN = frozenset(_MAKERS)  # names of the arguments that can be generated
