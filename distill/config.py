"""The settings of a distillation run: a TOML file with one table per dataclass below.

    [base]      the teacher            [loss]       weights of the three terms     [run]       steps, batch, precision
    [data]      what prepare made      [optimizer]  AdamW                          [save]      checkpoints, log
    [method]    the new attention      [schedule]   of the learning rate           [validate]  pictures on the way
    [trained]   which weights learn    [noise]      of the training inputs    [layerwise] an optional first stage

`[method]` is one method (`method = "clear"`, `radius = 16`), or one table per pattern of module names.
"""

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ..linearize.methods import config_from_dict, config_to_dict


def _require(right: bool, name: str, rule: str, value: object) -> None:
    if not right:
        raise ValueError(f"{name} must be {rule}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Base:
    """The pipeline that is teacher and, converted, student."""

    model: str  # a folder, or a repository id
    revision: str | None = None
    dtype: str = "float32"  # of the frozen weights; trained weights are always float32

    def __post_init__(self) -> None:
        _require(self.dtype in ("float32", "bfloat16"), "base.dtype", "float32 or bfloat16", self.dtype)


@dataclass(frozen=True, kw_only=True)
class Data:
    directory: str  # made by `prepare`

    @property
    def folder(self) -> Path:
        """With a `~` as the shell has it."""
        return Path(self.directory).expanduser()


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank updates beside the projections of the swapped attention modules, and the kernels' own weights."""

    rank: int = 16
    alpha: float | None = None  # None: the rank, so that the update is not scaled
    projections: tuple[str, ...] | None = None  # None: all that see the image; see linearize/training.py

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "trained.rank", ">= 1", self.rank)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The projections of the swapped attention modules themselves, as in CLEAR, and the kernels' own weights."""

    projections: tuple[str, ...] | None = None  # None: all that see the image; see linearize/training.py


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
            _require(weight >= 0, f"loss.{name}", ">= 0", weight)
        _require(any(asdict(self).values()), "loss", "above 0 in at least one term", asdict(self))


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, "optimizer.lr", "> 0 and finite", self.lr)
        _require(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas", "two numbers in [0, 1)", self.betas)
        _require(self.max_grad_norm > 0, "optimizer.max_grad_norm", "> 0", self.max_grad_norm)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate: a linear warm-up, then constant, or half a cosine down to `final` times the rate."""

    kind: str = "cosine"
    warmup: int = 100  # steps
    final: float = 0.0

    def __post_init__(self) -> None:
        _require(self.kind in ("cosine", "constant"), "schedule.kind", "cosine or constant", self.kind)
        _require(self.warmup >= 0, "schedule.warmup", ">= 0", self.warmup)
        _require(0 <= self.final < math.inf, "schedule.final", ">= 0 and finite", self.final)


@dataclass(frozen=True, kw_only=True)
class Layerwise:
    """A first stage (`layerwise.py`), before `run.steps` end to end; the schedule's kind, with a warm-up of its own."""

    steps: int = 0  # 0: no such stage
    lr: float = 1e-3
    warmup: int = 10  # steps

    def __post_init__(self) -> None:
        _require(self.steps >= 0, "layerwise.steps", ">= 0", self.steps)
        _require(0 < self.lr < math.inf, "layerwise.lr", "> 0 and finite", self.lr)
        _require(self.warmup >= 0, "layerwise.warmup", ">= 0", self.warmup)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """sigma = sigmoid(mean + std * normal), then shifted for the resolution as the pipeline's scheduler does."""

    mean: float = 0.0
    std: float = 1.0


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
        """With a `~` as the shell has it."""
        return Path(self.directory).expanduser()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation"):
            _require(getattr(self, name) >= 1, f"run.{name}", ">= 1", getattr(self, name))
        _require(self.min_tokens >= 0, "run.min_tokens", ">= 0", self.min_tokens)
        known = self.mixed_precision in PRECISIONS
        _require(known, "run.mixed_precision", " or ".join(PRECISIONS), self.mixed_precision)


@dataclass(frozen=True, kw_only=True)
class Save:
    every: int = 500  # steps between checkpoints
    keep_last: int = 2
    log_every: int = 100  # steps between drawings of the loss curve; the CSV has every step

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            _require(value >= 1, f"save.{name}", ">= 1", value)


@dataclass(frozen=True, kw_only=True)
class Validate:
    """The student redraws the last samples of the data, which training leaves out."""

    samples: int = 4  # 0: no validation
    every: int = 500  # steps; and once at the end

    def __post_init__(self) -> None:
        _require(self.samples >= 0, "validate.samples", ">= 0", self.samples)
        _require(self.every >= 1, "validate.every", ">= 1", self.every)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    base: Base
    data: Data
    run: Run
    method: Any  # a method's config, or {pattern: config}
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
            raise ValueError("run.mixed_precision must be bf16 or auto where base.dtype is bfloat16, got 'no'")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> DistillConfig:
    """Read a TOML file; each override is `table.key=value`, the value as in TOML, or bare text.

    Raises:
        ValueError: the file is no TOML, or a table, key or value is not known; the nearest name is suggested.
        OSError: the file cannot be read.
    """
    try:
        tables = tomllib.loads(Path(path).read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    for override in overrides:
        _override(tables, override)
    return config_from_tables(tables)


def config_from_tables(tables: Mapping[str, Any]) -> DistillConfig:
    """The config of nested dictionaries, as tomllib or `config_to_tables` gives them."""
    hints = get_type_hints(DistillConfig)
    _check_names(DistillConfig, tables, "")
    parts: dict[str, Any] = {}
    for name, table in tables.items():
        _require(isinstance(table, Mapping), name, "a table", table)
        if name == "method":
            parts[name] = _method(table)
        elif name == "trained":
            parts[name] = _trained(table)
        else:
            parts[name] = _build(hints[name], table, name)
    return DistillConfig(**parts)


def config_to_tables(config: DistillConfig) -> dict[str, Any]:
    """Nested dictionaries of plain values; `config_from_tables` reads them back."""
    tables: dict[str, Any] = {
        part.name: asdict(getattr(config, part.name)) for part in fields(config) if part.name != "method"
    }
    method = config.method
    tables["method"] = (
        {pattern: config_to_dict(one) for pattern, one in method.items()}
        if isinstance(method, Mapping)
        else config_to_dict(method)
    )
    kind = next(kind for kind, cls in TRAINED.items() if isinstance(config.trained, cls))
    tables["trained"] = {"kind": kind} | tables["trained"]
    return tables


def as_toml(value: Any) -> str:
    """A value as TOML has it on one line; dictionaries are inline tables, without what is None."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {as_toml(one)}" for key, one in value.items() if one is not None) + "}"
    return json.dumps(value)


def _override(tables: dict[str, Any], text: str) -> None:
    path, equals, value = text.partition("=")
    table, _, key = path.strip().partition(".")
    if not (equals and table and key):
        raise ValueError(f"an override must look like table.key=value, got {text!r}")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    tables.setdefault(table, {})[key] = parsed


def _method(table: Mapping[str, Any]) -> Any:
    if isinstance(table.get("method"), str):
        return config_from_dict(dict(table))
    patterns = all(isinstance(one, Mapping) for one in table.values())
    _require(patterns, "method", "one method (method = NAME), or one table per pattern", table)
    return {pattern: config_from_dict(dict(one)) for pattern, one in table.items()}


def _trained(table: Mapping[str, Any]) -> Any:
    kind = table.get("kind", "lora")
    _require(kind in TRAINED, "trained.kind", " or ".join(TRAINED), kind)
    return _build(TRAINED[kind], {key: value for key, value in table.items() if key != "kind"}, "trained")


def _build(cls: type, table: Mapping[str, Any], where: str) -> Any:
    hints = get_type_hints(cls)
    _check_names(cls, table, f"{where}.")
    return cls(**{key: _convert(value, hints[key], f"{where}.{key}") for key, value in table.items()})


def _check_names(cls: type, table: Mapping[str, Any], where: str) -> None:
    known = {item.name: item for item in fields(cls)}
    for key in table:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"unknown setting {where}{key}; {hint}")
    for name, item in known.items():
        if name not in table and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"the setting {where}{name} is missing")


def _convert(value: Any, hint: Any, where: str) -> Any:
    if get_origin(hint) is UnionType:
        hints = [one for one in get_args(hint) if one is not type(None)]
        return None if value is None else _convert(value, hints[0], where)
    if get_origin(hint) is tuple:
        inner, rest = get_args(hint)
        long_enough = isinstance(value, list | tuple) and (rest is Ellipsis or len(value) == len(get_args(hint)))
        _require(long_enough, where, f"a list of {inner.__name__}" + ("" if rest is Ellipsis else " pairs"), value)
        return tuple(_convert(one, inner, where) for one in value)
    if hint is float and type(value) is int:
        return float(value)
    _require(type(value) is hint, where, f"of type {hint.__name__}", value)
    return value
