"""Which window each layer gets under a budget of operations: a knapsack over what a profile measured.

    least  sum_l error_l(c_l)    with    sum_l flops_l(c_l) <= budget,    c_l a radius or full attention (error 0)

error_l(r) = |out_r - out|^2 / |out|^2 of the layer's own attention output. Compared with two other figures on
examples/tiny_flux (benchmarks/profile_budget.py): the attention that falls outside of the window says too little, since
what is far may add up to what is near; and the error of the model's prediction with that layer alone in a window, which
costs a forward for each layer and radius, chose worse, since layers that stand in for each other look harmless alone.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .attention_profile import LayerProfile, Profile
from .base import Base, build_on_meta
from .families import family_of
from .grouping import grouped
from .layout import Grid
from .matching import attention_modules, head_shape
from .methods.clear import Clear, ClearAttention

Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A window, or full attention, for each layer; `str()` tells it in one line.

    Attributes:
        configs: {glob of module names: config}, for `linearize_`; layers that it leaves out keep full attention.
        radii: For each module its radius, None: full attention.
        size: (height, width) in pixels that the operations are counted at.
        flops: Of the attention of all these layers in one step, batch 1.
        budget: What they were allowed.
        dense_flops: The same with full attention everywhere.
        error: Sum of the layers' errors.
    """

    configs: Mapping[str, Clear]
    radii: Mapping[str, float | None]
    size: Size
    flops: int
    budget: int
    dense_flops: int
    error: float

    def __str__(self) -> str:
        counts = Counter(self.radii.values())
        order = sorted(counts, key=lambda radius: np.inf if radius is None else radius)
        told = ", ".join(f"{counts[key]} x {'full attention' if key is None else f'radius {key:g}'}" for key in order)
        height, width = self.size
        shares = f"{self.flops / self.dense_flops:.2%} of full attention's, budget {self.budget / self.dense_flops:.2%}"
        return f"{told}; operations at {width}x{height}: {shares}"


def propose(
    profile: Profile,
    budget: float | Clear,
    *,
    size: Size | None = None,
    radii: Sequence[float] | None = None,
    full: bool = True,
) -> Proposal:
    """The windows that change the layers' outputs least for so many operations.

    Args:
        profile: Of the model that is to be converted.
        budget: A share of the operations of full attention, in (0, 1); or a config, for what it costs in every layer.
        size: (height, width) in pixels that the operations are counted at; None: the profile's.
        radii: To choose from; None: all that the profile has.
        full: Layers may keep full attention.
    Raises:
        ValueError: the budget is out of range, not enough for the smallest windows, or enough for full attention in
            every layer; or a radius was not profiled.
    """
    size = size or profile.size
    choices: list[float | None] = [*_columns(profile, radii), *([None] if full else [])]
    grids = [_grid_at(layer, profile.size, size) for layer in profile.layers]
    pairs = list(zip(profile.layers, grids, strict=True))
    dense_flops = sum(_flops(layer, grid, None) for layer, grid in pairs)
    limit = _limit(budget, pairs, dense_flops)
    flops = [[_flops(layer, grid, choice) for choice in choices] for layer, grid in pairs]
    errors = [[_error(profile, layer, choice) for choice in choices] for layer in profile.layers]
    if sum(map(min, flops)) > limit:
        least = sum(map(min, flops)) / dense_flops
        raise ValueError(
            f"the budget is {limit / dense_flops:.4f} of full attention, the smallest windows need {least:.4f}"
        )
    chosen = knapsack(flops, errors, limit)
    found = {layer.module: choices[option] for layer, option in zip(profile.layers, chosen, strict=True)}
    windows = {module: Clear(radius=radius) for module, radius in found.items() if radius is not None}
    if not windows:
        raise ValueError(f"a budget of {budget} leaves full attention in every layer: there is nothing to convert")
    groups = grouped(windows, list(found))
    return Proposal(
        configs={glob: windows[modules[0]] for glob, modules in groups.items()},
        radii=found,
        size=size,
        flops=sum(costs[option] for costs, option in zip(flops, chosen, strict=True)),
        budget=limit,
        dense_flops=dense_flops,
        error=sum(ones[option] for ones, option in zip(errors, chosen, strict=True)),
    )


def parse_budget(text: str) -> float | Clear:
    """What `propose` takes, from "0.25" or "radius:8".

    Raises:
        ValueError: neither.
    """
    name, colon, number = text.rpartition(":")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if math.isnan(value) or (colon and name != "radius"):
        raise ValueError(f"budget must be a share such as 0.25, or radius:R such as radius:8, got {text!r}")
    return Clear(radius=value) if colon else value


def knapsack(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], limit: int) -> list[int]:
    """One option for each item, with the least sum of errors among those whose costs sum up to `limit` at most.

    Exact: after each item it keeps every sum of costs that no cheaper or equal one beats.

    Args:
        costs, errors: [items][options]; the cheapest options together cost no more than `limit`.
    Returns:
        [items], the options.
    """
    spare = limit - sum(map(min, costs))
    cost, error = np.zeros(1, np.int64), np.zeros(1)
    steps: list[npt.NDArray[np.int64]] = []  # what was kept: row * options + option
    for one_costs, one_errors in zip(costs, errors, strict=True):
        extra = np.array(one_costs, np.int64) - min(one_costs)
        all_costs = (cost[:, None] + extra).ravel()
        all_errors = (error[:, None] + np.array(one_errors)).ravel()
        order = np.lexsort((all_errors, all_costs))
        order = order[all_costs[order] <= spare]
        best = np.minimum.accumulate(all_errors[order])
        kept = order[np.concatenate([[True], best[1:] < best[:-1]])]
        cost, error = all_costs[kept], all_errors[kept]
        steps.append(kept)
    options, row = [], len(cost) - 1
    for kept, one_costs in zip(reversed(steps), reversed(costs), strict=True):
        row, option = divmod(int(kept[row]), len(one_costs))
        options.append(option)
    return options[::-1]


def check_profile(profile: Profile, base: Base) -> None:
    """Raise a ValueError where a profile is of another model than this base."""
    model = build_on_meta(base)
    modules, _ = attention_modules(model, family_of(model))
    shapes = {name: head_shape(module) for name, module in modules.items()}
    profiled = {layer.module: (layer.num_heads, layer.head_dim) for layer in profile.layers}
    if profile.model_class != base.model_class or profiled != shapes:
        raise ValueError(
            f"the profile is of another model: {profile.base}, a {profile.model_class} of {len(profiled)} layers; "
            f"{base.source.name} is a {base.model_class} of {len(shapes)}, not all of those names and heads: profile it"
        )
    if profile.base != base.source.name:
        raise ValueError(
            f"the profile is of another model: {profile.base}, not {base.source.name}: profile that or, where it is "
            'the same model in another place, change "base" in the profile'
        )


def _columns(profile: Profile, radii: Sequence[float] | None) -> list[float]:
    if radii is None:
        return list(profile.radii)
    for radius in radii:
        if radius not in profile.radii:
            had = ", ".join(f"{one:g}" for one in profile.radii)
            raise ValueError(f"radius {radius:g} was not profiled, these were: {had}")
    return sorted(set(radii))


def _grid_at(layer: LayerProfile, profiled: Size, size: Size) -> Grid:
    """The layer's image tokens in a picture of another size."""
    *frames, height, width = layer.grid
    return (*frames, -(-height * size[0] // profiled[0]), -(-width * size[1] // profiled[1]))


def _flops(layer: LayerProfile, grid: Grid, radius: float | None) -> int:
    """Of one call, batch 1, as `flops.py` counts them."""
    if radius is None:
        pairs = (layer.text_len + int(np.prod(grid))) ** 2
    else:
        shape = {"num_heads": layer.num_heads, "head_dim": layer.head_dim}
        pairs = ClearAttention.pairs(Clear(radius=radius), grid, layer.text_len, **shape)
    return 4 * pairs * layer.num_heads * layer.head_dim


def _error(profile: Profile, layer: LayerProfile, radius: float | None) -> float:
    return 0.0 if radius is None else layer.output_error[profile.radii.index(radius)]


def _limit(budget: float | Clear, pairs: Sequence[tuple[LayerProfile, Grid]], dense_flops: int) -> int:
    if isinstance(budget, Clear):
        return sum(_flops(layer, grid, budget.radius) for layer, grid in pairs)
    if not 0 < budget < 1:
        raise ValueError(f"budget must be a share of full attention's operations between 0 and 1, got {budget}")
    return int(budget * dense_flops)
