"""Arguments of one forward of a denoiser, made by their names: diffusers' models call alike things alike.

N image tokens, `text` text tokens, batch 1. Floats have no numbers (meta device); position ids, masks and lengths do.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Text tokens of a prompt as a family's pipeline takes it; in all others 512, or what the config says.
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
# Their experts are chosen by numbers; ERNIE asks autocast for its device, which cannot be "meta".
_UNCOUNTED = ("HiDreamImageTransformer2DModel", "NucleusMoEImageTransformer2DModel", "ErnieImageTransformer2DModel")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture for one model.

    Attributes:
        config: The model's.
        names: Arguments of the model's forward.
        side: Of the square picture, in tokens; of a UNet, in latents.
        patch: Latents of the model's input per token, along one side.
        text: Number of text tokens.
    """

    config: Mapping[str, Any]
    names: tuple[str, ...]
    side: int
    patch: int
    text: int

    @property
    def tokens(self) -> int:
        return self.side**2

    @property
    def latents(self) -> int:
        """Side of the model's input."""
        return self.side * self.patch

    def first(self, *keys: str) -> Any:
        """The first of these in the config that is not None."""
        return next((self.config[key] for key in keys if self.config.get(key) is not None), None)

    @property
    def channels(self) -> int:
        return int(self.first("in_channels", "in_visual_dim"))

    def ids(self, axes: int) -> Tensor:
        """[N, axes]: row and column in columns 1 and 2."""
        ids = torch.zeros(self.side, self.side, axes)
        ids[..., 1] = torch.arange(self.side)[:, None]
        ids[..., 2] = torch.arange(self.side)
        return ids.flatten(0, 1)


def can_make_inputs(model: nn.Module) -> bool:
    """Whether `step_inputs` knows every argument that this model needs, and its forward runs without numbers."""
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    return type(model).__name__ not in _UNCOUNTED and all(name in _MAKERS for name in needed)


def step_inputs(model: Any, family: str, latents: int) -> dict[str, Any]:
    """Arguments of a forward for one square picture.

    Args:
        family: Name of the model's family.
        latents: Side of the picture in the VAE's latents; some are packed before the model.
    """
    config = model.config
    names = tuple(inspect.signature(type(model).forward).parameters)[1:]
    is_sequence = any(name in names for name in _SEQUENCES)
    patch = config.get("patch_size") or (1 if is_sequence else 2)
    patch = patch if isinstance(patch, int) else patch[-1]
    packed = 2 if "img_ids" in names or "position_ids" in names else 1
    side = latents // packed // patch
    text = config.get("text_len") or _TEXT.get(family, 512)
    if "sample" in names:  # a UNet
        side, patch = latents, 1
    picture = Picture(config=config, names=names, side=side, patch=1 if is_sequence else patch, text=text)
    made = {name: _MAKERS[name](picture) for name in names if name in _MAKERS}
    return {name: value for name, value in made.items() if value is not None}


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _image(picture: Picture) -> Tensor:
    side, channels = picture.latents, picture.channels
    patch: Any = picture.config.get("patch_size")
    if "shape_list" in picture.names:
        return _floats(1, picture.tokens, channels, *patch)
    if "indicator" in picture.names:
        return _floats(1, picture.text + picture.tokens, channels)
    if any(name in picture.names for name in _SEQUENCES):
        return _floats(1, picture.tokens, channels)
    if "visual_rope_pos" in picture.names:
        return _floats(1, 1, side, side, channels)
    frames = (1,) if isinstance(patch, (list, tuple)) and len(patch) == 3 else ()
    return _floats(1, channels, *frames, side, side)


def _text(picture: Picture) -> Tensor | None:
    width = picture.first(*_TEXT_WIDTHS)
    if picture.config.get("use_crossattn_projection"):
        width = picture.config["crossattn_proj_in_channels"]
    if "indicator" in picture.names:
        return _floats(1, picture.text + picture.tokens, width)
    if "text_hidden_dim" in picture.config:
        return _floats(1, picture.text, picture.config["num_text_layers"], picture.config["text_hidden_dim"])
    if "injection_layer_ids" in picture.config:
        return _floats(1, 1 + len(picture.config["injection_layer_ids"]), picture.text, width)
    return _floats(1, picture.text, width)


def _pooled(picture: Picture) -> Tensor | None:
    width = picture.first("pooled_projection_dim", "in_text_dim2")
    return None if width is None else _floats(1, width)


def _control(picture: Picture) -> Tensor:
    """Latents as the image's, or for a UNet pixels."""
    if "sample" in picture.names:
        scale = 2 ** (len(picture.config["conditioning_embedding_out_channels"]) - 1)
        return _floats(1, picture.config["conditioning_channels"], *[scale * picture.latents] * 2)
    image = _image(picture)
    extra = picture.first("extra_conditioning_channels", "extra_condition_channels") or 0
    axis = 1 if image.ndim == 4 else 2
    return _floats(*(size + extra * (index == axis) for index, size in enumerate(image.shape)))


def _position_ids(picture: Picture) -> Tensor:
    ids = torch.cat([torch.zeros(picture.text, 3), picture.ids(3)])
    return ids.long()[None] if "indicator" in picture.names else ids


def _added_conditions(picture: Picture) -> dict[str, Tensor]:
    if "sample" not in picture.names:
        return {"resolution": _floats(1, 2), "aspect_ratio": _floats(1, 1)}
    time_ids, width = 6, picture.config["projection_class_embeddings_input_dim"] or 0
    text_embeds = width - time_ids * (picture.config["addition_time_embed_dim"] or 0)
    return {"text_embeds": _floats(1, text_embeds), "time_ids": _floats(1, time_ids)}


def _rotary(picture: Picture) -> Any:
    if "hidden_size" in picture.config and "encoder_mask" in picture.names:  # Lumina-Next
        head_dim = picture.config["hidden_size"] // picture.config["num_attention_heads"]
        return _floats(picture.side, picture.side, head_dim // 2).to(torch.complex64)
    return (_floats(picture.tokens, picture.config["attention_head_dim"]),) * 2


def _text_mask(picture: Picture) -> Tensor:
    return torch.ones(1, picture.text, dtype=torch.bool)


def _second_text_mask(picture: Picture) -> Tensor:
    return torch.ones(1, picture.first("text_len_t5") or 128, dtype=torch.bool)


def _pair(picture: Picture) -> Tensor:
    return _floats(1, 2)


def _one(picture: Picture) -> Tensor:
    return _floats(1)


def _shapes(picture: Picture) -> list[list[tuple[int, int, int]]]:
    return [[(1, picture.side, picture.side)]]


_MAKERS: dict[str, Callable[[Picture], Any]] = {
    "hidden_states": _image,
    "sample": _image,
    "x": lambda picture: [_floats(picture.channels, 1, picture.latents, picture.latents)],
    "encoder_hidden_states": _text,
    "encoder_hidden_states_t5": lambda picture: _floats(
        1, picture.config["text_len_t5"], picture.config["cross_attention_dim_t5"]
    ),
    "encoder_hidden_states_2": lambda picture: (
        _floats(1, 128, picture.config["text_embed_2_dim"]) if picture.config["text_embed_2_dim"] else None
    ),
    "cap_feats": lambda picture: [_floats(picture.text, picture.config["cap_feat_dim"])],
    "text_encoder_layers": lambda picture: (
        [_floats(1, picture.text, picture.config["text_encoder_dim"])]
        * (picture.config["num_layers"] + picture.config["num_single_layers"])
    ),
    "pooled_projections": _pooled,
    "controlnet_cond": _control,
    "timestep": _one,
    "t": _one,
    "target_timestep": lambda picture: _floats(1) if picture.config.get("flow_map") else None,
    "guidance": lambda picture: _floats(1) if picture.config.get("guidance_embeds") else None,
    "img_ids": lambda picture: picture.ids(len(picture.config["axes_dims_rope"])),
    "txt_ids": lambda picture: torch.zeros(picture.text, len(picture.config["axes_dims_rope"])),
    "position_ids": _position_ids,
    "segment_ids": lambda picture: torch.ones(1, picture.text + picture.tokens, dtype=torch.long),
    "indicator": lambda picture: torch.tensor([[3] * picture.text + [2] * picture.tokens]),
    "img_shapes": _shapes,
    "shape_list": _shapes,
    "img_mask": lambda picture: torch.arange(picture.text + picture.tokens // 4)[None] >= picture.text,
    "image_rotary_emb": _rotary,
    "visual_rope_pos": lambda picture: [torch.arange(side) for side in (1, picture.side, picture.side)],
    "text_rope_pos": lambda picture: torch.arange(picture.text),
    "encoder_attention_mask": lambda picture: _text_mask(picture) if "sample" not in picture.names else None,
    "encoder_attention_mask_2": lambda picture: (
        _second_text_mask(picture) if picture.config["text_embed_2_dim"] else None
    ),
    "encoder_mask": _text_mask,
    "text_embedding_mask": _text_mask,
    "text_embedding_mask_t5": _second_text_mask,
    "padding_mask": lambda picture: _floats(1, 1, picture.latents, picture.latents),
    "added_cond_kwargs": _added_conditions,
    "cross_attention_kwargs": lambda picture: {},
    "class_labels": lambda picture: (
        torch.zeros(1, dtype=torch.long) if picture.config.get("num_embeds_ada_norm") else None
    ),
    "image_meta_size": lambda picture: _floats(1, 6),
    "style": lambda picture: torch.zeros(1, dtype=torch.long),
    "original_size": _pair,
    "target_size": _pair,
    "crop_coords": _pair,
    "prior_token_id": lambda picture: torch.zeros(1, picture.tokens, dtype=torch.long),
    "prior_token_drop": lambda picture: torch.zeros(1, dtype=torch.bool),
}
