"""The settings of a distillation run: a TOML file (`config_tables.py`) with one table per dataclass below.

    [base]      the teacher            [loss]       weights of the three terms     [run]       steps, batch, precision
    [data]      made by `prepare`      [optimizer]  AdamW                          [save]      checkpoints, log
    [method]    the new attention      [schedule]   of the learning rate           [validate]  during training
    [trained]   which weights learn    [noise]      of the training inputs         [layerwise] optional first phase
    [start]     adapter to start from

`[method]` is one method (`method = "clear"`, `radius = 16`), or one table per pattern of module names.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..linearize.adapters.quantization import CASTING, Quantization


def require(condition: bool, name: str, rule: str, value: object) -> None:
    """Raise a ValueError that says what a setting must be."""
    if not condition:
        raise ValueError(f"{name} must be {rule}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Base:
    """The pipeline: the teacher and, once converted, the student."""

    model: str  # a folder, or a repository id
    revision: str | None = None
    dtype: str = "float32"  # of the frozen weights; trained weights are always float32
    quantization: Quantization | None = None  # of the frozen weights in the denoiser's Linear layers

    def __post_init__(self) -> None:
        require(self.dtype in ("float32", "bfloat16"), "base.dtype", "float32 or bfloat16", self.dtype)


@dataclass(frozen=True, kw_only=True)
class Data:
    directory: str  # made by `prepare`

    @property
    def folder(self) -> Path:
        """`directory` with `~` expanded."""
        return Path(self.directory).expanduser()


@dataclass(frozen=True, kw_only=True)
class Start:
    """An adapter to start from; unless set, `load_config` takes the method and the kind of weights from it."""

    adapter: str | None = None  # a folder, a file, or a repository id; None: start as converted
    revision: str | None = None

    def __post_init__(self) -> None:
        alone = self.revision is not None and self.adapter is None
        require(not alone, "start.revision", "left out without start.adapter", self.revision)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Settings of both kinds of trained weights."""

    projections: tuple[str, ...] | None = None  # None: all that see the image; see linearize/weights/training.py
    ema: float = 0.0  # decay of the moving average that is validated and saved; 0: none

    def __post_init__(self) -> None:
        require(self.projections != (), "trained.projections", "left out, or name at least one layer", self.projections)
        require(0 <= self.ema < 1, "trained.ema", "in [0, 1), 0 for no average", self.ema)


@dataclass(frozen=True, kw_only=True)
class Lora(Weights):
    """Low-rank updates of the projections of the swapped attention modules, and the kernels' own weights."""

    rank: int = 16
    alpha: float | None = None  # None: the rank, so that the update is not scaled

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank >= 1, "trained.rank", ">= 1", self.rank)
        require(self.alpha is None or 0 < self.alpha < math.inf, "trained.alpha", "> 0 and finite", self.alpha)


@dataclass(frozen=True, kw_only=True)
class Attention(Weights):
    """The projections of the swapped attention modules themselves, as in CLEAR, and the kernels' own weights."""


PRECISIONS = ("no", "bf16", "auto")
TRAINED = {"lora": Lora, "attention": Attention}


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Weights of the terms (defaults: CLEAR, arXiv:2412.16112); a term of weight 0 is not computed."""

    flow: float = 1.0
    prediction: float = 0.5
    attention: float = 0.5

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            require(0 <= weight < math.inf, f"loss.{name}", ">= 0 and finite", weight)
        require(any(asdict(self).values()), "loss", "above 0 in at least one term", asdict(self))


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, "optimizer.lr", "> 0 and finite", self.lr)
        require(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas", "two numbers in [0, 1)", self.betas)
        require(self.max_grad_norm > 0, "optimizer.max_grad_norm", "> 0", self.max_grad_norm)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate: a linear warm-up, then constant, or half a cosine down to `final` times the rate."""

    kind: str = "cosine"
    warmup: int = 100  # steps
    final: float = 0.0

    def __post_init__(self) -> None:
        require(self.kind in ("cosine", "constant"), "schedule.kind", "cosine or constant", self.kind)
        require(self.warmup >= 0, "schedule.warmup", ">= 0", self.warmup)
        require(0 <= self.final < math.inf, "schedule.final", ">= 0 and finite", self.final)


@dataclass(frozen=True, kw_only=True)
class Layerwise:
    """A first phase (`layerwise.py`) before `run.steps` end to end; follows [schedule], with its own warm-up."""

    steps: int = 0  # 0: skip this phase
    lr: float = 1e-3
    warmup: int = 10  # steps

    def __post_init__(self) -> None:
        require(self.steps >= 0, "layerwise.steps", ">= 0", self.steps)
        require(0 < self.lr < math.inf, "layerwise.lr", "> 0 and finite", self.lr)
        require(self.warmup >= 0, "layerwise.warmup", ">= 0", self.warmup)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """sigma = sigmoid(mean + std * normal), then shifted for the resolution as the pipeline's scheduler does."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        require(math.isfinite(self.mean), "noise.mean", "finite", self.mean)
        require(0 <= self.std < math.inf, "noise.std", ">= 0 and finite", self.std)


@dataclass(frozen=True, kw_only=True)
class Run:
    directory: str
    steps: int  # end to end
    batch_size: int = 8  # samples per step, over all processes
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    mixed_precision: str = "no"  # of the student: no, bf16, or auto: bf16 where it is faster than float32
    impl: str = "auto"  # of the new attention
    min_tokens: int = 0  # levels of a UNet with fewer image tokens keep full attention
    seed: int = 0

    @property
    def folder(self) -> Path:
        """`directory` with `~` expanded."""
        return Path(self.directory).expanduser()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation"):
            require(getattr(self, name) >= 1, f"run.{name}", ">= 1", getattr(self, name))
        require(0 <= self.seed < 2**63, "run.seed", "in [0, 2**63)", self.seed)
        require(self.min_tokens >= 0, "run.min_tokens", ">= 0", self.min_tokens)
        known = self.mixed_precision in PRECISIONS
        require(known, "run.mixed_precision", " or ".join(PRECISIONS), self.mixed_precision)


@dataclass(frozen=True, kw_only=True)
class Save:
    every: int = 500  # steps between checkpoints
    keep_last: int = 2
    log_every: int = 100  # steps between redraws of the loss curve; the CSV has every step
    report_to: tuple[str, ...] = ()  # experiment trackers besides the CSV, by accelerate's names: ("wandb",)

    def __post_init__(self) -> None:
        for name in ("every", "keep_last", "log_every"):
            require(getattr(self, name) >= 1, f"save.{name}", ">= 1", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Validate:
    """On the last samples, held out from training, the student redraws the pictures or predicts the kept calls."""

    samples: int = 4  # 0: no validation
    every: int = 500  # steps; and once at the end

    def __post_init__(self) -> None:
        require(self.samples >= 0, "validate.samples", ">= 0", self.samples)
        require(self.every >= 1, "validate.every", ">= 1", self.every)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    base: Base
    data: Data
    run: Run
    method: Any  # a method's config, or {pattern: config}
    start: Start = field(default_factory=Start)
    trained: Lora | Attention = field(default_factory=Lora)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    layerwise: Layerwise = field(default_factory=Layerwise)
    noise: Noise = field(default_factory=Noise)
    save: Save = field(default_factory=Save)
    validate: Validate = field(default_factory=Validate)

    def __post_init__(self) -> None:
        if self.base.dtype == "bfloat16" and self.run.mixed_precision == "no":
            raise ValueError("run.mixed_precision must be bf16 or auto if base.dtype is bfloat16, got 'no'")
        if self.base.quantization is not None and not isinstance(self.trained, Lora):
            raise ValueError(
                "trained.kind must be lora if base.quantization is set, got 'attention': 8-bit and 4-bit projections "
                "cannot be trained, but a LoRA on them can"
            )
        casts = self.base.quantization is not None and self.base.quantization.quant_backend == CASTING
        if casts and not self.run.gradient_checkpointing:
            raise ValueError(
                f"run.gradient_checkpointing must be true if base.quantization is {CASTING}: without it, the cast "
                "weights of every layer stay in memory until the backward pass"
            )
