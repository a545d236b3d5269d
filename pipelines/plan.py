"""The plan of a high-resolution call: the stages of a cascade, their settings and their cost.

`planning.py` makes the default plan.
"""

import json
import math
from dataclasses import asdict, dataclass
from typing import Literal

Attention = Literal["original", "converted", "both"]
KNOWN_SCALE = 2  # a model knows positions up to this many times its native side: it was trained on long pictures too
STRENGTH = 0.3
STEPS = 8
FOLLOW = 1.0
SHARPEN = 1.0
MAX_SHARPEN = 10
MAX_STEPS = 10_000  # bounds the list of noise levels
MIN_TILE = 64  # pixels; the smallest that can be requested


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One denoising of the whole picture.

    Attributes:
        height, width: In pixels.
        steps: Forwards of the model.
        strength: Noise level of the enlarged picture, in (0, 1]; 1, as in the first stage, starts from pure noise. For
            schedulers other than flow matching, the share of their steps, as in diffusers' image-to-image.
        shift: Shift of the noise levels, sigma = shift t / (1 + (shift - 1) t), t in even steps to 0; None: the levels
            of the pipeline's scheduler.
        attention: "original" or "converted".
        rope_factor: Factor of the base of rotary positions; 1: as trained.
        logit_factor: Factor of the logits of converted attention (`proportional_factor`); 1: as trained.
        follow: Weight in [0, 1] with which low frequencies follow the previous stage; 0: they are free.
        sharpen: Strength of sharpening of the enlarged picture (`pictures.enlarged`); 0: none.
        chunk_tokens: Number of tokens on which token-wise layers run at a time, to save memory (`token_chunks.py`);
            None: all tokens.
        seconds, gib: Rough estimates of time and peak memory; None: unknown.
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
    sharpen: float = 0.0
    chunk_tokens: int | None = None
    seconds: float | None = None
    gib: float | None = None

    def __post_init__(self) -> None:
        counts = {"height": self.height, "width": self.width, "steps": self.steps}
        if self.chunk_tokens is not None:
            counts["chunk_tokens"] = self.chunk_tokens
        for name, number in counts.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} of a stage must be an integer >= 1, got {number!r}")
        if self.steps > MAX_STEPS:
            raise ValueError(f"steps of a stage must be <= {MAX_STEPS}, got {self.steps}")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength of a stage must be in (0, 1], got {self.strength!r}")
        if self.attention not in ("original", "converted"):
            raise ValueError(f"attention of a stage must be original or converted, got {self.attention!r}")
        if not 0 <= self.follow <= 1:
            raise ValueError(f"follow of a stage must be in [0, 1], got {self.follow!r}")
        if not 0 <= self.sharpen <= MAX_SHARPEN:
            raise ValueError(f"sharpen of a stage must be in [0, {MAX_SHARPEN}], got {self.sharpen!r}")
        for name in ("shift", "rope_factor", "logit_factor"):
            number = getattr(self, name)
            if number is not None and not 0 < number < math.inf:
                raise ValueError(f"{name} of a stage must be > 0 and finite, got {number!r}")
        if self.logit_factor != 1 and self.attention == "original":
            raise ValueError(f"logit_factor must be 1 with original attention, got {self.logit_factor}")

    @property
    def is_stock(self) -> bool:
        """Whether it is the stock pipeline's call, from pure noise."""
        return self.strength == 1 and self.shift is None

    def sigmas(self) -> list[float] | None:
        """Noise levels of the steps, without the final 0; None: the scheduler's."""
        if self.shift is None:
            return None
        first = self.strength / (self.shift - (self.shift - 1) * self.strength)
        times = [first * (self.steps - step) / self.steps for step in range(self.steps)]
        return [self.shift * time / (1 + (self.shift - 1) * time) for time in times]

    def __str__(self) -> str:
        words = [
            f"{self.width}x{self.height}",
            f"{self.steps} step{'s' * (self.steps != 1)}",
            f"{self.attention} attention",
        ]
        if self.shift is not None:
            words.append(f"from noise level {self.strength:g}, shift {self.shift:.3g}")
        elif self.strength < 1:
            words.append(f"strength {self.strength:g}")
        words += [f"rope x{self.rope_factor:.3g}"] if self.rope_factor != 1 else []
        words += [f"logits x{self.logit_factor:.3g}"] if self.logit_factor != 1 else []
        words += [f"enlarged sharply ({self.sharpen:g})"] if self.sharpen else []
        words += [f"low frequencies follow at {self.follow:g}"] if self.follow else []
        words += [f"token-wise layers in chunks of {self.chunk_tokens}"] if self.chunk_tokens is not None else []
        words += [_about(self.seconds, 0, "s")] if self.seconds is not None else []
        words += [_about(self.gib, 1, "GiB")] if self.gib is not None else []
        return ", ".join(words)


def _about(amount: float, digits: int, unit: str) -> str:
    """`about 3 s`, or `less than 1 s` for an amount that rounds to 0."""
    number = f"{amount:.{digits}f}"
    return f"about {number} {unit}" if float(number) else f"less than {10**-digits:g} {unit}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The stages of one call, to read, change (`dataclasses.replace`) and pass as `pipe(plan=...)`.

    Attributes:
        height, width: Size of the output in pixels; the last stage is at least as large, and is cropped.
        stages: In order, each larger than the previous one.
        tile: Side in pixels of the VAE's tiles for larger pictures; None: in one piece.
        notes: Warnings and advice for the user.
    """

    height: int
    width: int
    stages: tuple[Stage, ...]
    tile: int | None = 1024
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a plan needs at least one stage, got none")
        check_tile(self.tile)
        last = self.stages[-1]
        if last.height < self.height or last.width < self.width:
            raise ValueError(
                f"the last stage must be at least as large as the picture, {self.width}x{self.height}, "
                f"got {last.width}x{last.height}"
            )

    def recipe(self) -> str:
        """JSON of what makes the picture, without what differs between machines: the same text, the same picture."""
        stages = [asdict(stage) for stage in self.stages]
        for stage in stages:
            for name in ("seconds", "gib", "chunk_tokens"):
                del stage[name]
        return json.dumps({"tile": self.tile, "stages": stages})

    def __str__(self) -> str:
        lines = [f"{self.width}x{self.height} in {len(self.stages)} stage{'s' if len(self.stages) > 1 else ''}"]
        lines += [f"  {number}. {stage}" for number, stage in enumerate(self.stages, start=1)]
        if self.tile is not None and max(self.stages[-1].height, self.stages[-1].width) > self.tile:
            lines.append(f"  VAE in tiles of {self.tile} pixels, with attention within each tile")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def check_tile(tile: int | None) -> None:
    """Raise a ValueError if this is not a valid side of a tile."""
    if tile is not None and (type(tile) is not int or tile < MIN_TILE):
        raise ValueError(f"tile must be an integer >= {MIN_TILE} pixels or None, got {tile!r}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of all stages after the first.

    Attributes:
        strength, steps, sharpen: As in `Stage`.
        follow: As in `Stage`; None: 1 for flow-matching schedulers, else 0.
        shift: As in `Stage`; None: the scheduler's at its largest size.
        rope_factor: As in `Stage`; None: NTK scaling beyond the positions the model knows, if it has rotary positions.
        proportional: c in CLEAR's proportional attention, sqrt(log(c N) / log(N_trained)); None: logits as trained.
        chunk_tokens: As in `Stage`; None: chunks if the estimate exceeds the GPU's free memory.
    """

    strength: float = STRENGTH
    steps: int = STEPS
    sharpen: float = SHARPEN
    follow: float | None = None
    shift: float | None = None
    rope_factor: float | None = None
    proportional: float | None = None
    chunk_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The properties of a pipeline that a plan depends on.

    Attributes:
        native: Side in pixels of the square pictures that the model was trained on.
        multiple: Sides in pixels are multiples of it; the side of a transformer's token.
        largest_shift: The scheduler's shift at its largest size; None: it has its own noise levels.
        rope_dim: Dimensions of a head that are rotated by one axis of the picture; None: there is no base to scale.
        attention: The attention that the model can run.
        follows: Whether low frequencies can follow the previous stage.
        largest: Longest side in pixels for which it has positions; None: any.
        table: Longest side in pixels of its table of positions, which is stretched beyond; None: it has no table.
        counts_tokens: Whether it attends to all tokens of picture and text at once, unlike a UNet.
        chunks: Whether its token-wise layers can run in chunks.
    """

    native: int
    multiple: int
    largest_shift: float | None
    rope_dim: int | None
    attention: Attention
    follows: bool = True
    largest: int | None = None
    table: int | None = None
    counts_tokens: bool = True
    chunks: bool = True

    @property
    def known(self) -> int:
        """Longest side in pixels whose positions the model knows."""
        return KNOWN_SCALE * self.native
