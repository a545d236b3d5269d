"""What the seam knows of a kind of model, and what it reads from the arguments of one forward."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..layout import Grid

CACHED_REFERENCES = (
    "reference images whose keys and values are kept between the steps (kv_cache) have no window: use a pipeline that "
    "runs them in every step (FLUX.2: Flux2KleinPipeline), make this call inside `with dense(pipe):`, or restore_ it"
)


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What the arguments of one forward say.

    Attributes:
        grid: Size of the image in tokens.
        text_lens: How many other tokens (text, registers, padding, reference images) an attention call of the image
            may have beside it; a call with none needs no entry.
        image_starts: Where the image begins, in each sample of the batch or once for all; None: the other tokens all
            stand on the family's side of it. Only for the calls with the most other tokens.
        text_mask: [B, text_len] bool, True = attend, for models that would make a tokens x tokens mask of it.
        replaced: Arguments to hand on in place of those that came, by name.
    """

    grid: Grid
    text_lens: tuple[int, ...] = ()
    image_starts: tuple[int, ...] | None = None
    text_mask: Tensor | None = None
    replaced: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one kind of model is converted. Pass your own to `linearize_(..., family=...)`.

    Attributes:
        name: For reports.
        attention: Globs of module names; those of them that are not cross-attention are the image's self-attention.
            Such a module calls `scaled_dot_product_attention` once.
        see: (module, arguments by name) -> Sight. A module-level function, so that models can be copied and pickled.
        text_first: In joint attention the text stands before the image.
        text_queries: In joint attention the text's tokens attend as well; False: they are attended to only.
        image_alone: Globs of those of the modules whose calls never have text or other tokens beside the image.
        seen_at: Class name of the modules whose arguments tell the grid; None: the model itself.
        blocks: Class names of the repeated blocks, for `compile_`.
        masked_at: Class names of the modules that would make a tokens x tokens mask of their `attention_mask`: those
            with a converted attention get None for it where there is a `Sight.text_mask`, which stands in.
        native_tokens: (model, name of an attention module) -> image tokens at the size that the model was trained
            for, where modules differ in that (the levels of a UNet).
    """

    name: str
    attention: tuple[str, ...]
    see: Callable[[nn.Module, Mapping[str, Any]], Sight]
    text_first: bool = True
    text_queries: bool = True
    image_alone: tuple[str, ...] = ()
    seen_at: str | None = None
    blocks: tuple[str, ...] = ()
    masked_at: tuple[str, ...] = ()
    native_tokens: Callable[[nn.Module, str], int] | None = None
