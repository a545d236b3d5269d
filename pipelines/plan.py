"""What a high-resolution call will do, before it does it: the stages of a cascade, their settings and their cost.

A cascade makes the picture at the size that the model was trained on, enlarges it, adds noise to it, and denoises
again, until the size asked for. Where each default comes from:

    stages          sides at most twice those of the stage before
    attention       the original up to twice the native area (CLEAR's authors advise it at the native size), then linear
    strength, steps the small model of this repository, which loses its pictures above; CLEAR (arXiv:2412.16112) starts
                    FLUX at 2K and 4K from noise level 0.875, 14 steps
    shift           what the scheduler takes at its largest size; stock pipelines extrapolate it, up to pure noise
    rope_factor     NTK scaling where a side is beyond the positions the model knows: r ** (d / (d - 2))
    follow          low frequencies follow the stage before (I-Max, arXiv:2410.07536) beyond those positions
"""

import json
import math
from dataclasses import asdict, dataclass
from typing import Literal

Attention = Literal["original", "converted", "both"]
KNOWN = 2  # a model knows positions up to this many times its native side: it was trained on long pictures too
STRENGTH = 0.3
STEPS = 8
FOLLOW = 0.5


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One denoising of the whole picture.

    Attributes:
        height, width: In pixels.
        steps: Forwards of the model.
        strength: Noise level that the enlarged picture gets, in (0, 1]; 1, as in the first stage: it is forgotten.
        shift: Of the noise levels, sigma = shift t / (1 + (shift - 1) t), t in even steps to 0; None: as the pipeline's
            scheduler has it.
        attention: "original" or "converted".
        rope_factor: What multiplies the base of rotary positions; 1: as trained.
        logit_factor: What multiplies the logits of converted attention (`proportional_factor`); 1: as trained.
        follow: Weight in [0, 1] by which low frequencies follow the stage before; 0: they are free.
        seconds, gib: Rough estimates of time and peak memory; None where nothing is known.
    """

    height: int
    width: int
    steps: int
    strength: float = 1.0
    shift: float | None = None
    attention: str = "original"
    rope_factor: float = 1.0
    logit_factor: float = 1.0
    follow: float = 0.0
    seconds: float | None = None
    gib: float | None = None

    def __post_init__(self) -> None:
        for name in ("height", "width", "steps"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} of a stage must be an integer >= 1, got {number!r}")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength of a stage must be in (0, 1], got {self.strength!r}")
        if self.attention not in ("original", "converted"):
            raise ValueError(f"attention of a stage must be original or converted, got {self.attention!r}")
        if not 0 <= self.follow <= 1:
            raise ValueError(f"follow of a stage must be in [0, 1], got {self.follow!r}")
        for name in ("shift", "rope_factor", "logit_factor"):
            number = getattr(self, name)
            if number is not None and not 0 < number < math.inf:
                raise ValueError(f"{name} of a stage must be > 0 and finite, got {number!r}")
        if self.shift is None and self.strength < 1:
            raise ValueError("a stage of strength below 1 needs a shift of its own, got None")
        if self.logit_factor != 1 and self.attention == "original":
            raise ValueError(f"logit_factor is of converted attention, got {self.logit_factor} with the original")

    def sigmas(self) -> list[float] | None:
        """Noise levels of the steps, before the last one goes to 0; None: the scheduler's own."""
        if self.shift is None:
            return None
        first = self.strength / (self.shift - (self.shift - 1) * self.strength)
        times = [first * (self.steps - step) / self.steps for step in range(self.steps)]
        return [self.shift * time / (1 + (self.shift - 1) * time) for time in times]

    def __str__(self) -> str:
        words = [f"{self.width}x{self.height}", f"{self.steps} steps", f"{self.attention} attention"]
        if self.shift is not None:
            words.append(f"from noise level {self.strength:g}, shift {self.shift:.3g}")
        words += [f"rope x{self.rope_factor:.3g}"] if self.rope_factor != 1 else []
        words += [f"logits x{self.logit_factor:.3g}"] if self.logit_factor != 1 else []
        words += [f"low frequencies follow at {self.follow:g}"] if self.follow else []
        words += [f"about {self.seconds:.0f} s"] if self.seconds is not None else []
        words += [f"about {self.gib:.1f} GiB"] if self.gib is not None else []
        return ", ".join(words)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The stages of one call, to be read, changed (`dataclasses.replace`) and handed back as `pipe(plan=...)`.

    Attributes:
        height, width: Of the picture that comes out, in pixels; the last stage is at least as large, and is cropped.
        stages: In order, each larger than the one before.
        tile: Side in pixels of the tiles in which the VAE works on pictures that are larger; None: in one piece.
        notes: What the user should know.
    """

    height: int
    width: int
    stages: tuple[Stage, ...]
    tile: int | None = 1024
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a plan needs at least one stage, got none")
        if self.tile is not None and (isinstance(self.tile, bool) or self.tile < 64):
            raise ValueError(f"tile must be an integer >= 64 pixels or None, got {self.tile!r}")
        last = self.stages[-1]
        if last.height < self.height or last.width < self.width:
            raise ValueError(
                f"the last stage must be at least as large as the picture, {self.width}x{self.height}, "
                f"got {last.width}x{last.height}"
            )

    def settings(self) -> str:
        """As JSON, without what differs between machines: calls with the same settings make the same picture."""
        stages = [asdict(stage) for stage in self.stages]
        for stage in stages:
            del stage["seconds"], stage["gib"]
        return json.dumps({"tile": self.tile, "stages": stages})

    def __str__(self) -> str:
        lines = [f"{self.width}x{self.height} in {len(self.stages)} stage{'s' if len(self.stages) > 1 else ''}"]
        lines += [f"  {number}. {stage}" for number, stage in enumerate(self.stages, start=1)]
        if self.tile is not None and max(self.stages[-1].height, self.stages[-1].width) > self.tile:
            lines.append(f"  VAE in tiles of {self.tile} pixels, and its attention within them")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of the stages after the first.

    Attributes:
        strength, steps: As in `Stage`.
        shift: As in `Stage`; None: what the scheduler takes at its largest size.
        rope_factor: As in `Stage`; None: NTK scaling beyond the positions that the model knows.
        follow: As in `Stage`; None: 0.5 beyond those positions, else 0.
        proportional: N of CLEAR's proportional attention counts this many times; None: logits as trained.
    """

    strength: float = STRENGTH
    steps: int = STEPS
    shift: float | None = None
    rope_factor: float | None = None
    follow: float | None = None
    proportional: float | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a pipeline is, as far as a plan must know.

    Attributes:
        native: Side in pixels of the square pictures that the model was trained on.
        multiple: Sides in pixels are multiples of it; a token is as large.
        largest_shift: Of the scheduler.
        rope_dim: Numbers of a head that one axis of the picture turns.
        attention: What the model can run.
    """

    native: int
    multiple: int
    largest_shift: float
    rope_dim: int
    attention: Attention

    @property
    def known(self) -> int:
        """Pixels of the longest side whose positions the model knows."""
        return KNOWN * self.native


def cascade(
    height: int,
    width: int,
    limits: Limits,
    settings: Settings,
    *,
    first_steps: int,
    enlarge: bool,
    text_len: int,
    tile: int | None,
) -> Plan:
    """The default plan.

    Args:
        height, width: In pixels, any.
        first_steps: Of the first stage.
        enlarge: There is a picture already: no stage at native size.
        text_len: Tokens, for proportional attention.
        tile: Side in pixels of the VAE's tiles.
    Raises:
        ValueError: a setting is out of range.
    """
    if min(height, width) < 1:
        raise ValueError(f"height and width must be >= 1, got {height} and {width}")
    sizes = stage_sizes(height, width, limits, enlarge=enlarge)
    stages: list[Stage] = []
    for rows, columns in sizes:
        small = rows * columns <= 2 * limits.native**2  # there the original is as fast
        original = limits.attention == "original" or (limits.attention == "both" and small)
        attention = "original" if original else "converted"
        if not stages and not enlarge:
            stages.append(Stage(height=rows, width=columns, steps=first_steps, attention=attention))
        else:
            stages.append(_larger_stage(rows, columns, attention, limits, settings, text_len))
    notes = _notes(height, width, stages[-1], limits)
    return Plan(height=height, width=width, stages=tuple(stages), tile=tile, notes=notes)


def _larger_stage(height: int, width: int, attention: str, limits: Limits, settings: Settings, text_len: int) -> Stage:
    beyond = max(height, width) / limits.known
    rope_factor, follow, logit_factor = settings.rope_factor, settings.follow, 1.0
    if rope_factor is None:
        rope_factor = ntk_factor(beyond, limits.rope_dim)
    if follow is None:
        follow = FOLLOW if beyond > 1 else 0.0
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
        rope_factor=rope_factor,
        follow=follow,
        logit_factor=logit_factor,
    )


def _notes(height: int, width: int, last: Stage, limits: Limits) -> tuple[str, ...]:
    notes = []
    if (last.height, last.width) != (height, width):
        notes.append(
            f"sides are multiples of {limits.multiple} pixels: {last.width}x{last.height} is made and cropped to "
            f"{width}x{height}"
        )
    if limits.attention == "original":
        notes.append("the model is not converted, so every size has its full attention: linearize_ it first")
    elif limits.attention == "converted":
        notes.append("the originals of its trained weights were not kept, so every size has its converted attention")
    if max(height, width) > limits.known and last.follow == 0:
        notes.append(
            f"beyond {limits.known} pixels a side the model does not know its positions, and low frequencies do not "
            "follow the stage before: expect repeated objects; set follow, or make a smaller picture"
        )
    if max(height, width) > 8 * limits.native:
        notes.append(f"nobody has shown pictures beyond {8 * limits.native} pixels a side from such a model")
    return tuple(notes)


def stage_sizes(height: int, width: int, limits: Limits, *, enlarge: bool) -> list[tuple[int, int]]:
    """(height, width) of each stage: of one shape, from the native area on, in even steps of at most a factor 2.

    The last one is rounded up to what the model can make, the others to the nearest. Up to sqrt(2) times the native
    side there is one stage. Where a picture is there to enlarge, the one of native size is left out.
    """
    last = tuple(math.ceil(side / limits.multiple) * limits.multiple for side in (height, width))
    ratio = math.sqrt(last[0] * last[1]) / limits.native
    doublings = math.ceil(round(math.log2(ratio), 6)) if ratio > math.sqrt(2) else 0
    sizes = []
    for index in range(1 if enlarge else 0, doublings):
        share = ratio ** (index / doublings - 1)
        rows, columns = (max(1, round(side * share / limits.multiple)) * limits.multiple for side in last)
        sizes.append((rows, columns))
    return [*sizes, (last[0], last[1])]


def ntk_factor(ratio: float, rope_dim: int) -> float:
    """What multiplies the base of rotary positions so that the slowest one spans `ratio` times as many of them.

    Neural-tangent-kernel scaling: base * ratio ** (d / (d - 2)), d the numbers of a head that one axis turns.
    """
    return max(1.0, ratio) ** (rope_dim / (rope_dim - 2))


def proportional_factor(num_tokens: int, trained_tokens: int, count: float = 1.0) -> float:
    """CLEAR's proportional attention: logits times sqrt(log(count * N) / log(N_train)), text included in both."""
    return math.sqrt(math.log(count * num_tokens) / math.log(trained_tokens))
