"""Which attention module gets which method: globs on full module names."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .errors import UnsupportedModelError
from .families import Family
from .methods import METHODS
from .methods.field_checks import check_count
from .report import CROSS_ATTENTION, NOT_IMAGE_SELF_ATTENTION


def attention_modules(model: nn.Module, family: Family) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The modules that can be swapped, and for each other attention module why it cannot.

    Raises:
        UnsupportedModelError: there is nothing to swap.
    """
    candidates: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        matches = any(fnmatchcase(name, pattern) for pattern in family.attention)
        if not matches and not hasattr(module, "get_processor"):
            continue
        if getattr(module, "is_cross_attention", False):
            skipped[name] = CROSS_ATTENTION
        elif not matches:
            skipped[name] = NOT_IMAGE_SELF_ATTENTION
        else:
            candidates[name] = module
    if not candidates:
        raise UnsupportedModelError(
            f"this {type(model).__name__} has no self-attention module named like {', '.join(family.attention)}; near "
            f"names: {', '.join(_near(family.attention[0], [name for name, _ in model.named_modules()]))}"
        )
    return candidates, skipped


def check_text(name: str, family: Family, config: Any) -> None:
    """Raise an UnsupportedModelError if a method is for the image alone and a module may see text as well."""
    sees_image_only = any(fnmatchcase(name, pattern) for pattern in family.image_alone)
    if METHODS[type(config)].image_alone and not sees_image_only:
        method, layers = type(config).__name__, ", ".join(map(repr, family.image_alone))
        remedy = f"choose layers={layers}" if layers else "set image_alone in a custom Family"
        raise UnsupportedModelError(
            f"{method} needs self-attention over image tokens only, but {name} of family {family.name} may also see "
            f"text: use another method (Clear, Mala, Rala, ...), or {remedy}"
        )


def levels_below(model: nn.Module, family: Family, names: Sequence[str], min_tokens: int) -> dict[str, str]:
    """The modules with fewer than `min_tokens` image tokens at the model's native size, and this as the reason.

    Raises:
        ValueError: `min_tokens` is not a count, leaves no module, or is given for a family without levels.
    """
    check_count("min_tokens", min_tokens, least=0)
    if min_tokens == 0:
        return {}
    if family.native_tokens is None:
        raise ValueError(f"min_tokens is for models with levels, such as a UNet; a {type(model).__name__} has none")
    counts = {name: family.native_tokens(model, name) for name in names}
    if max(counts.values()) < min_tokens:
        levels = ", ".join(map(str, sorted(set(counts.values()), reverse=True)))
        raise ValueError(
            f"min_tokens must be <= {max(counts.values())}: the levels have {levels} tokens, got {min_tokens}"
        )
    return {name: f"{count} tokens, fewer than {min_tokens}" for name, count in counts.items() if count < min_tokens}


def head_shape(attention: Any) -> tuple[int, int]:
    """(heads, head_dim) of the queries of an attention module, by the names that diffusers' classes give them.

    Raises:
        UnsupportedModelError: it has no number of heads, such as a layer inside attention that a glob matches too, or
            nothing that tells their size.
    """
    num_heads = getattr(attention, "heads", None) or getattr(attention, "num_heads", None)
    if num_heads is None:
        raise UnsupportedModelError(
            f"a {type(attention).__name__} that Family.attention matches has neither `heads` nor `num_heads`: `*` in a "
            "glob matches dots as well, so end it with the attention module's own name"
        )
    if hasattr(attention, "head_dim"):
        return num_heads, attention.head_dim
    if hasattr(attention, "inner_dim"):
        return num_heads, attention.inner_dim // num_heads
    to_query = getattr(attention, "to_q", None) or getattr(attention, "to_query", None)  # Kandinsky's name
    if to_query is None:
        raise UnsupportedModelError(
            f"a {type(attention).__name__} that Family.attention matches has none of `head_dim`, `inner_dim` and "
            "`to_q`: set its `head_dim`"
        )
    return num_heads, to_query.out_features // num_heads


def choose(names: Sequence[str], patterns: Mapping[str, Any], layers: Sequence[str] | None) -> dict[str, Any]:
    """Module name -> config, for the names that `layers` (None: all) and one pattern match.

    Raises:
        ValueError: a pattern matches nothing, two match one layer, or `layers` has something other than globs.
    """
    allowed = list(names)
    if layers is not None:
        if not (isinstance(layers, Sequence) and layers and all(isinstance(glob, str) for glob in layers)):
            raise ValueError(f"layers must be None (all), a glob of module names, or a list of them, got {layers!r}")
        chosen = {name for glob in layers for name in _matches(glob, names, "layers")}
        allowed = [name for name in names if name in chosen]
    configs: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for pattern, config in patterns.items():
        for name in _matches(pattern, allowed, "pattern"):
            if name in owner:
                raise ValueError(f"two patterns match {name}, {owner[name]!r} and {pattern!r}: make them disjoint")
            owner[name], configs[name] = pattern, config
    return {name: configs[name] for name in names if name in configs}


def _matches(pattern: str, names: Sequence[str], argument: str) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        near = ", ".join(_near(pattern, names))
        raise ValueError(f"{argument} {pattern!r} matches no self-attention module; near names: {near}")
    return found


def _near(pattern: str, names: Sequence[str]) -> list[str]:
    return get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names[:3])
