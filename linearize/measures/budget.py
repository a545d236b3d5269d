"""Chooses the attention of each layer under a budget of operations: a knapsack over a profile's measurements.

    minimize  sum_l error_l(c_l)    subject to    sum_l flops_l(c_l) <= budget,
    c_l a window of a profiled radius, another profiled method, or full attention (error 0)

error_l(c) = |out_c - out|^2 / |out|^2 of the layer's own attention output. Two other criteria were compared with it on
examples/tiny_flux (benchmarks/profile_budget.py). The attention outside the window says too little: distant values may
add up to the same as near ones. The error of the model's prediction with only that layer in a window costs a forward
for each layer and radius and chose worse: layers that can compensate for each other look harmless alone.

Errors of different methods are not comparable. In the same script, a mix of windows and agents has a smaller sum of
errors than windows alone, but worse predictions. So other methods are chosen only if they are named, and `nearness`
measures what a mix is worth.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..adapters.base import Base, build_on_meta
from ..adapters.grouping import grouped
from ..families import FAMILIES, family_of
from ..layout import Grid
from ..matching import attention_modules, head_shape
from ..methods import METHODS, config_to_dict, format_setting
from ..methods.clear import Clear
from .attention_profile import LayerProfile, Profile, is_window

Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A method, or full attention, for each layer; `str()` summarizes it in one line.

    Attributes:
        configs: {glob of module names: config}, for `linearize_`; layers that it leaves out keep full attention.
        chosen: {module name: config}; None: full attention.
        size: (height, width) in pixels that the operations are counted at.
        flops: Attention operations of all these layers in one step, batch 1.
        budget: Upper limit of `flops`.
        dense_flops: `flops` with full attention everywhere.
        error: Sum of the layers' errors.
    """

    configs: Mapping[str, Any]
    chosen: Mapping[str, Any]
    size: Size
    flops: int
    budget: int
    dense_flops: int
    error: float

    def __str__(self) -> str:
        counts = Counter(self.chosen.values()).most_common()
        summary = ", ".join(f"{count} x {describe_choice(choice)}" for choice, count in counts)
        height, width = self.size
        shares = f"{self.flops / self.dense_flops:.2%} of full attention's, budget {self.budget / self.dense_flops:.2%}"
        return f"{summary}; operations at {width}x{height}: {shares}"


def propose(
    profile: Profile,
    budget: Any,
    *,
    size: Size | None = None,
    choices: Sequence[Any] | None = None,
) -> Proposal:
    """Choose the attention that changes the layers' outputs least within a budget of operations.

    Args:
        profile: Profile of the model to convert.
        budget: A share of the operations of full attention, in (0, 1); or a config, for what it costs in every layer.
        size: (height, width) in pixels that the operations are counted at; None: the profile's.
        choices: Candidates of the profile, and None for full attention; default: its windows and full attention.
    Raises:
        ValueError: the budget is out of range, not enough for the cheapest choices, or enough for full attention in
            every layer; or a choice was not profiled.
    """
    size = size or profile.size
    choices = [*profile.windows, None] if choices is None else list(choices)
    _check_choices(profile, choices)
    grids = [_grid_at(layer, profile.size, size) for layer in profile.layers]
    pairs = list(zip(profile.layers, grids, strict=True))
    dense_flops = sum(_flops(profile, layer, grid, None) for layer, grid in pairs)
    limit = _limit(profile, budget, pairs, dense_flops)
    flops = [[_flops(profile, layer, grid, choice) for choice in choices] for layer, grid in pairs]
    errors = [[_error(profile, layer, choice) for choice in choices] for layer in profile.layers]
    if sum(map(min, flops)) > limit:
        cheapest = sum(map(min, flops)) / dense_flops
        raise ValueError(
            f"the budget is {limit / dense_flops:.4f} of full attention, but the cheapest choices need {cheapest:.4f}: "
            "raise the budget, or profile and choose cheaper attention"
        )
    chosen = knapsack(flops, errors, limit)
    choice_of_layer = {layer.module: choices[option] for layer, option in zip(profile.layers, chosen, strict=True)}
    swapped = {module: choice for module, choice in choice_of_layer.items() if choice is not None}
    if not swapped:
        raise ValueError(
            f"a budget of {budget} leaves full attention in every layer, so there is nothing to convert: lower it"
        )
    groups = grouped(swapped, list(choice_of_layer))
    return Proposal(
        configs={glob: swapped[modules[0]] for glob, modules in groups.items()},
        chosen=choice_of_layer,
        size=size,
        flops=sum(costs[option] for costs, option in zip(flops, chosen, strict=True)),
        budget=limit,
        dense_flops=dense_flops,
        error=sum(ones[option] for ones, option in zip(errors, chosen, strict=True)),
    )


def parse_budget(text: str) -> float | Clear:
    """Parse a budget for `propose`, such as "0.25" or "radius:8".

    Raises:
        ValueError: it is neither a number nor a radius.
    """
    name, colon, number = text.rpartition(":")
    value = _number(number)
    if math.isnan(value) or (colon and name != "radius"):
        raise ValueError(f"budget must be a share such as 0.25, or radius:R such as radius:8, got {text!r}")
    return Clear(radius=value) if colon else value


def parse_choices(profile: Profile, text: str) -> list[Any]:
    """Parse choices for `propose`, such as "4,8,mala,full": radii, methods (all their configs), full attention.

    Raises:
        ValueError: a choice was not profiled.
    """
    names: dict[str, list[Any]] = {f"{window.radius:g}": [window] for window in profile.windows}
    for method in profile.methods:
        names.setdefault(type(method).__name__.lower(), []).append(method)
    names["full"] = [None]
    choices: list[Any] = []
    for word in map(str.strip, text.split(",")):
        found = names.get(word) or [window for window in profile.windows if _number(word) == window.radius]
        if not found:
            raise ValueError(f"{word!r} was not profiled: choices are {', '.join(names)}, got {text!r}")
        choices += found
    return choices


def describe_choice(choice: Any) -> str:
    """A choice in words: "radius 8", "full attention", or as the command spells a method."""
    if choice is None:
        return "full attention"
    return f"radius {choice.radius:g}" if is_window(choice) else format_setting(config_to_dict(choice))


def _number(text: str) -> float:
    """The text as a float; NaN if it is not a number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def knapsack(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], limit: int) -> list[int]:
    """Choose one option for each item, with the least total error at a total cost of at most `limit`.

    Exact: after each item it keeps every total that no other total of lower or equal cost beats in error.

    Args:
        costs, errors: [items][options]; the cheapest options together cost no more than `limit`.
    Returns:
        [items], indices of the options.
    """
    slack = limit - sum(map(min, costs))
    cost, error = np.zeros(1, np.int64), np.zeros(1)
    steps: list[npt.NDArray[np.int64]] = []  # totals that were kept, as row * options + option
    for item_costs, item_errors in zip(costs, errors, strict=True):
        extra = np.array(item_costs, np.int64) - min(item_costs)
        all_costs = (cost[:, None] + extra).ravel()
        all_errors = (error[:, None] + np.array(item_errors)).ravel()
        order = np.lexsort((all_errors, all_costs))
        order = order[all_costs[order] <= slack]
        best = np.minimum.accumulate(all_errors[order])
        kept = order[np.concatenate([[True], best[1:] < best[:-1]])]
        cost, error = all_costs[kept], all_errors[kept]
        steps.append(kept)
    options, row = [], len(cost) - 1
    for kept, item_costs in zip(reversed(steps), reversed(costs), strict=True):
        row, option = divmod(int(kept[row]), len(item_costs))
        options.append(option)
    return options[::-1]


def check_profile(profile: Profile, base: Base) -> None:
    """Raise a ValueError if a profile is of another model than this base."""
    model = build_on_meta(base)
    modules, _ = attention_modules(model, family_of(model))
    shapes = {name: head_shape(module) for name, module in modules.items()}
    profiled = {layer.module: (layer.num_heads, layer.head_dim) for layer in profile.layers}
    if profile.model_class != base.model_class or profiled != shapes:
        raise ValueError(
            f"the profile is of another model: {profile.base}, a {profile.model_class} with {len(profiled)} layers; "
            f"{base.source.name} is a {base.model_class} with {len(shapes)}, and their names or heads differ: profile "
            "it"
        )
    if profile.base != base.source.name:
        raise ValueError(
            f"the profile is of another model: {profile.base}, not {base.source.name}: profile that or, if it is "
            'the same model at another location, change "base" in the profile'
        )


def _check_choices(profile: Profile, choices: Sequence[Any]) -> None:
    if not choices:
        raise ValueError("choices must hold at least one, got none")
    for choice in choices:
        if choice is not None and choice not in profile.candidates:
            profiled = ", ".join(map(describe_choice, profile.candidates))
            raise ValueError(f"{describe_choice(choice)} was not profiled; profiled choices: {profiled}")
    for layer in profile.layers:
        if not np.isfinite(layer.output_error).all():
            raise ValueError(f"the profile has no finite error for every candidate in {layer.module}: make it again")


def _grid_at(layer: LayerProfile, profiled: Size, size: Size) -> Grid:
    """The layer's token grid in a picture of another size."""
    *frames, height, width = layer.grid
    return (*frames, -(-height * size[0] // profiled[0]), -(-width * size[1] // profiled[1]))


def _flops(profile: Profile, layer: LayerProfile, grid: Grid, choice: Any) -> int:
    """Operations of one call of a layer, batch 1, as `flops.py` counts them; choice None: full attention."""
    if choice is None:
        family = FAMILIES.get(profile.model_class)
        text_queries = family is None or family.text_queries
        num_image = math.prod(grid)
        pairs = (num_image + text_queries * layer.text_len) * (num_image + layer.text_len)
    else:
        shape = {"num_heads": layer.num_heads, "head_dim": layer.head_dim}
        pairs = METHODS[type(choice)].pairs(choice, grid, layer.text_len, **shape)
    return 4 * pairs * layer.num_heads * layer.head_dim


def _error(profile: Profile, layer: LayerProfile, choice: Any) -> float:
    return 0.0 if choice is None else layer.output_error[profile.candidates.index(choice)]


def _limit(profile: Profile, budget: Any, pairs: Sequence[tuple[LayerProfile, Grid]], dense_flops: int) -> int:
    if type(budget) in METHODS:
        return sum(_flops(profile, layer, grid, budget) for layer, grid in pairs)
    if not 0 < budget < 1:
        raise ValueError(f"budget must be a share of full attention's operations between 0 and 1, got {budget}")
    return int(budget * dense_flops)
