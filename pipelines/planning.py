"""The default plan of a high-resolution call: sizes of the stages, and their settings.

A cascade makes the picture at the size that the model was trained on, enlarges it, adds noise to it, and denoises
again, up to the requested size. Sources of the defaults:

    stages          sides at most twice those of the previous stage
    attention       the original up to twice the native area (CLEAR's authors advise it at the native size), then linear
    strength, steps the small model of this repository, which loses the picture at higher values; CLEAR
                    (arXiv:2412.16112) starts FLUX at 2K and 4K from noise level 0.875, 14 steps
    sharpen         the small model: blurred edges stay blurred at the noise level of `strength`, stage after stage
    shift           the scheduler's at its largest size; stock pipelines extrapolate it, up to pure noise
    rope_factor     NTK scaling if a side is beyond the positions the model knows: r ** (d / (d - 2)), r relative to
                    the native side; relative to the known side, half as much, the small model draws a frame around
                    pictures of 8 times its native side
    follow          low frequencies follow the previous stage (I-Max, arXiv:2410.07536), in flow matching; without it,
                    the small model lost half an object of a hard picture at twice its native side
"""

import math
from numbers import Integral

from .pictures import warn_stretched
from .plan import FOLLOW, Limits, Plan, Settings, Stage


def cascade(
    height: int,
    width: int,
    limits: Limits,
    settings: Settings,
    *,
    first_steps: int,
    enlarge: bool | tuple[int, int],
    text_len: int,
    tile: int | None,
) -> Plan:
    """The default plan.

    Args:
        height, width: In pixels, any.
        first_steps: Of the first stage.
        enlarge: Start from an existing picture, of native size (True) or of this (height, width).
        text_len: Tokens, for proportional attention.
        tile: Side in pixels of the VAE's tiles.
    Raises:
        ValueError: a setting is out of range.
    """
    if not all(isinstance(side, Integral) and side >= 1 for side in (height, width)):
        raise ValueError(f"height and width must be integers >= 1, got {height!r} and {width!r}")
    if not isinstance(settings, Settings):
        raise ValueError(f"settings must be lineardit.pipelines.Settings(...) or None, got {settings!r}")
    if enlarge and settings.strength == 1 and limits.largest_shift is None:
        raise ValueError("strength must be below 1 to enlarge a picture: at 1 the picture is ignored")
    if isinstance(enlarge, tuple):
        warn_stretched(enlarge, (height, width))
    sizes = stage_sizes(height, width, limits, enlarge=enlarge)
    stages: list[Stage] = []
    for rows, columns in sizes:
        small = rows * columns <= 2 * limits.native**2  # converted attention gains little
        original = limits.attention == "original" or (limits.attention == "both" and small)
        attention = "original" if original else "converted"
        if not stages and not enlarge:
            stages.append(Stage(height=rows, width=columns, steps=first_steps, attention=attention))
        else:
            stages.append(_larger_stage(rows, columns, attention, limits, settings, text_len))
    notes = _notes(height, width, stages[-1], limits)
    return Plan(height=height, width=width, stages=tuple(stages), tile=tile, notes=notes)


def _larger_stage(height: int, width: int, attention: str, limits: Limits, settings: Settings, text_len: int) -> Stage:
    longest = max(height, width)
    rope_factor, logit_factor, follow = settings.rope_factor, 1.0, settings.follow
    if rope_factor is None and limits.rope_dim is not None and longest > limits.known:
        rope_factor = ntk_factor(longest / limits.native, limits.rope_dim)
    if follow is None:
        follow = FOLLOW if limits.follows else 0.0
    if settings.proportional is not None and attention == "converted":
        tokens, trained = (side // limits.multiple**2 + text_len for side in (height * width, limits.native**2))
        logit_factor = proportional_factor(tokens, trained, settings.proportional)
    return Stage(
        height=height,
        width=width,
        steps=settings.steps,
        strength=settings.strength,
        shift=limits.largest_shift if settings.shift is None else settings.shift,
        attention=attention,
        rope_factor=1.0 if rope_factor is None else rope_factor,
        follow=follow,
        sharpen=settings.sharpen,
        logit_factor=logit_factor,
        chunk_tokens=settings.chunk_tokens,
    )


def _notes(height: int, width: int, last: Stage, limits: Limits) -> tuple[str, ...]:
    notes = []
    if (last.height, last.width) != (height, width):
        notes.append(
            f"sides are multiples of {limits.multiple} pixels: {last.width}x{last.height} is made and cropped to "
            f"{width}x{height}"
        )
    if limits.attention == "original":
        notes.append("the model is not converted: every size uses full attention (linearize_, `lineardit convert`)")
    elif limits.attention == "converted":
        notes.append("the base cannot be restored (`with dense(pipe):` says why): every size uses converted attention")
    if max(height, width) > limits.known and last.follow == 0:
        remedy = "set follow, or make a smaller picture" if limits.follows else "keep strength low"
        notes.append(
            f"the model was not trained beyond {limits.known} pixels a side, and low frequencies do not follow the "
            f"previous stage: expect repeated objects; {remedy}"
        )
    if limits.table is not None and max(last.height, last.width) > limits.table:
        notes.append(
            f"the model's table of positions covers {limits.table} pixels a side and is stretched beyond, which is "
            "untested with trained weights"
        )
    if max(height, width) > 8 * limits.native:
        notes.append(f"no pictures beyond {8 * limits.native} pixels a side have been published for such a model")
    return tuple(notes)


def stage_sizes(height: int, width: int, limits: Limits, *, enlarge: bool | tuple[int, int]) -> list[tuple[int, int]]:
    """(height, width) of each stage: of one aspect ratio, from the native area on, in even steps of at most a factor 2.

    The last one is rounded up to what the model can make, the others to the nearest. Up to sqrt(2) times the native
    side there is one stage. A picture to enlarge replaces the native stage, unless its side, from `enlarge` = (height,
    width), is below 1 / sqrt(2) of the native one; a larger picture is not reduced first.
    """
    last = tuple(-(-side // limits.multiple) * limits.multiple for side in (height, width))
    picture = math.sqrt(math.prod(enlarge)) if isinstance(enlarge, tuple) else limits.native
    ratio = math.sqrt(last[0] * last[1]) / max(limits.native, picture)
    doublings = math.ceil(round(math.log2(ratio), 6)) if ratio > math.sqrt(2) else 0
    replaces_native = bool(enlarge) and picture * math.sqrt(2) >= limits.native
    sizes = []
    for index in range(1 if replaces_native else 0, doublings):
        share = ratio ** (index / doublings - 1)
        rows, columns = (max(1, round(side * share / limits.multiple)) * limits.multiple for side in last)
        sizes.append((rows, columns))
    return [*sizes, (last[0], last[1])]


def ntk_factor(ratio: float, rope_dim: int) -> float:
    """Factor of the base of rotary positions with which the slowest frequency spans `ratio` times as many positions.

    NTK scaling (neural tangent kernel): base * ratio ** (d / (d - 2)), d the head dimensions that one axis rotates.
    """
    return max(1.0, ratio) ** (rope_dim / (rope_dim - 2))


def proportional_factor(num_tokens: int, trained_tokens: int, count: float = 1.0) -> float:
    """CLEAR's proportional attention: logits times sqrt(log(count * N) / log(N_train)), text included in both.

    Raises:
        ValueError: count * num_tokens is at most 1.
    """
    if not count * num_tokens > 1:
        raise ValueError(f"proportional must be > 1 / {num_tokens} tokens, got {count!r}")
    return math.sqrt(math.log(count * num_tokens) / math.log(trained_tokens))
