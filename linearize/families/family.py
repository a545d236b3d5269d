"""What the seam needs to know about a model class, and what it reads from the arguments of a forward."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..layout import Grid

CACHED_REFERENCES = (
    "reference images with keys and values cached between steps (kv_cache) are not supported: use a pipeline that "
    "recomputes them in every step (FLUX.2: Flux2KleinPipeline), run this call inside `with dense(pipe):`, or "
    "restore_ it"
)


@dataclass(frozen=True, kw_only=True)
class ForwardLayout:
    """The layout of tokens that the arguments of one forward determine.

    Attributes:
        grid: Size of the image in tokens.
        text_lens: Possible numbers of other tokens (text, registers, padding, reference images) in an attention call of
            the image; a call without any needs no entry.
        image_starts: Index of the first image token, for each sample of the batch or once for all; None: all other
            tokens are on the family's side of the image. Applies only to the calls with the most other tokens.
        text_mask: [B, text_len] bool, True = attend, for models that would expand it to a tokens x tokens mask.
        replaced: Arguments, by name, to pass on instead of the original ones.
    """

    grid: Grid
    text_lens: tuple[int, ...] = ()
    image_starts: tuple[int, ...] | None = None
    text_mask: Tensor | None = None
    replaced: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a model class is converted. Pass your own to `linearize_(..., family=...)`.

    Attributes:
        name: Name in reports.
        attention: Globs of module names that match the image's self-attention (cross-attention among them is ignored).
            Each such module calls `scaled_dot_product_attention` once.
        read_layout: (module, arguments by name) -> layout. A module-level function: models can be copied and pickled.
        text_first: Text comes before the image in joint attention.
        text_queries: Text tokens are queries in joint attention; False: they are keys only.
        image_alone: Globs of those modules whose calls contain only image tokens, never text or others.
        layout_at: Class name of the modules whose arguments determine the grid; None: the model itself.
        blocks: Class names of the repeated blocks, for `compile_`.
        masked_at: Class names of the modules that would expand their `attention_mask` to tokens x tokens. Those with
            converted attention receive None instead if there is a `ForwardLayout.text_mask`, which replaces it.
        native_tokens: (model, name of an attention module) -> image tokens at the size the model was trained for, if
            modules differ in it (the levels of a UNet).
    """

    name: str
    attention: tuple[str, ...]
    read_layout: Callable[[nn.Module, Mapping[str, Any]], ForwardLayout]
    text_first: bool = True
    text_queries: bool = True
    image_alone: tuple[str, ...] = ()
    layout_at: str | None = None
    blocks: tuple[str, ...] = ()
    masked_at: tuple[str, ...] = ()
    native_tokens: Callable[[nn.Module, str], int] | None = None

    def __post_init__(self) -> None:
        for name in ("attention", "image_alone", "blocks", "masked_at"):
            if isinstance(value := getattr(self, name), str):
                raise ValueError(f"Family.{name} must be a tuple of names, such as ({value!r},), got {value!r}")
