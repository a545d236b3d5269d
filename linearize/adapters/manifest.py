"""`lineardit.json`: what an adapter is, which base it belongs to, and how its tensors file must look.

An adapter in a single safetensors file has the same text in its header, under `lineardit`.

{"format_version": 1,
 "base": "black-forest-labs/FLUX.1-dev", "base_revision": "3de623f...", "base_license": "other",
 "pipeline_class": "FluxPipeline", "model_class": "FluxTransformer2DModel", "family": "flux",
 "attention": {"transformer_blocks.*.attn": {"24x128": 19}},
 "methods": {"transformer_blocks.*.attn": {"method": "clear", "radius": 16}},
 "trained": [{"kind": "lora", "rank": 16, "alpha": 16.0}],
 "tensors": {"file": "lineardit.safetensors", "bytes": 71303168, "sha256": "..."},
 "versions": {"lineardit": "0.1.0", "diffusers": "0.42.1", "torch": "2.13.0"}}
"""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import did_you_mean
from ..folders import read_header
from ..methods import config_from_dict
from ..methods.field_checks import check_count

FORMAT_VERSION = 1
MANIFEST_FILE = "lineardit.json"
TENSORS_FILE = "lineardit.safetensors"
SINGLE_FILE_SUFFIX = ".safetensors"
HEADER_KEY = "lineardit"  # in the header of a single file


@dataclass(frozen=True, kw_only=True)
class TensorsFile:
    """The tensors file that belongs to a manifest."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One overlay: `lora` with its rank and alpha, or `full` for tensors that replace the base's."""

    kind: str
    rank: int | None = None
    alpha: float | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of `lineardit.json`; the module's docstring shows one.

    Attributes:
        base: Hub id or folder of the pipeline, or of the bare denoiser; None: never saved.
        base_revision: Commit of a Hub id; None: a folder.
        base_license: From its model card or LICENSE file.
        pipeline_class: None: the base is a bare denoiser.
        family: Name of the model's family.
        attention: The swapped modules: {pattern: {"heads x head_dim" as "24x128": number of modules}}.
        methods: {pattern: a method's config as JSON}.
        dense_below: As in `linearize_`; not written where it is 0.
        trained: What was trained besides the kernels' own parameters, each kind at most once.
        tensors: None: there is no tensor to load, or they are in the same file.
        versions: Versions of the libraries that wrote it.
    """

    format_version: int = FORMAT_VERSION
    base: str | None
    base_revision: str | None = None
    base_license: str | None = None
    pipeline_class: str | None = None
    model_class: str
    family: str | None = None
    attention: Mapping[str, Mapping[str, int]]
    methods: Mapping[str, Mapping[str, Any]]
    dense_below: int = 0
    trained: tuple[Trained, ...] = ()
    tensors: TensorsFile | None = None
    versions: Mapping[str, str]

    def configs(self) -> dict[str, Any]:
        """{pattern: config}, as `linearize_` takes it."""
        return {pattern: config_from_dict(entries) for pattern, entries in self.methods.items()}

    @property
    def dense_tokens(self) -> int:
        """`dense_below`, or 0 if weights were trained for the new attention."""
        return 0 if self.trained else self.dense_below

    def to_json(self) -> str:
        trained = [{key: value for key, value in asdict(one).items() if value is not None} for one in self.trained]
        return json.dumps(_without_zero(asdict(self) | {"trained": trained}), indent=2) + "\n"

    def header(self) -> dict[str, str]:
        """Header of a single file: the manifest as JSON, and entries that other programs show."""
        shown = {"family": self.family, "base": self.base, "base_revision": self.base_revision}
        return {
            "format": "pt",
            HEADER_KEY: self.to_json(),
            "method": ", ".join(sorted({entries["method"] for entries in self.methods.values()})),
            "settings": json.dumps(self.methods),
            **{key: value for key, value in shown.items() if value is not None},
        }


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The `lineardit` entry of a converted model's config.json.

    Attributes:
        warning: Shown to readers of the file if trained weights were merged into the base's; None: they were not.
        methods: {pattern: a method's config as JSON}.
        dense_below: As in `linearize_`; not written where it is 0.
        trained: What was trained besides the kernels' own parameters, each kind at most once.
        changed: Patterns of the names of the base's parameters that training changed.
    """

    warning: str | None = None
    methods: Mapping[str, Mapping[str, Any]]
    dense_below: int = 0
    trained: tuple[Trained, ...] = ()
    changed: tuple[str, ...] = ()

    def configs(self) -> dict[str, Any]:
        """{pattern: config}, as `linearize_` takes it."""
        return {pattern: config_from_dict(entries) for pattern, entries in self.methods.items()}

    @property
    def dense_tokens(self) -> int:
        """`dense_below`, or 0 if weights were trained for the new attention."""
        return 0 if self.trained or self.changed else self.dense_below

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return _without_zero({key: value for key, value in asdict(self).items() if value is not None})


def _without_zero(entries: dict[str, Any]) -> dict[str, Any]:
    """Drop a `dense_below` of 0, so that older versions can read files that do not need it."""
    return {key: value for key, value in entries.items() if key != "dense_below" or value}


def read_entry(entries: Any) -> Entry:
    """Check and parse the entry of a config.json.

    Raises:
        ValueError: an unknown key (the nearest is named), or a value of the wrong kind.
    """
    entry = _record("lineardit", Entry, entries, warning=(str, type(None)), methods=dict, trained=list, changed=list)
    check_count("lineardit.dense_below", entry.dense_below, least=0)
    entry = replace(entry, trained=_all_trained(entry.trained), changed=tuple(entry.changed))
    entry.configs()
    return entry


def read_manifest(path: Path) -> Manifest:
    """Read and check a `lineardit.json`, or the same in the header of a single file.

    Raises:
        ValueError: it is missing, damaged, of a newer format, or has an unknown key (the nearest is named) or a value
            of the wrong kind.
    """
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: pass an adapter folder written by save_adapter or `lineardit convert`"
        )
    try:
        entries = json.loads(_text(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy or download it again") from error
    try:
        return _manifest(entries)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _text(path: Path) -> str:
    if path.suffix != SINGLE_FILE_SUFFIX:
        return path.read_text(encoding="utf-8")
    header = read_header(path)
    if HEADER_KEY not in header:
        raise ValueError(
            f"{path} has no {HEADER_KEY!r} in its header, so it is not an adapter; import checkpoints from other "
            "projects with `lineardit convert BASE --import clear:FILE`"
        )
    return header[HEADER_KEY]


def _manifest(entries: Any) -> Manifest:
    entries = _entries("the file", entries)
    version = entries.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"format_version must be {FORMAT_VERSION}, got {version!r}: "
            "the file was written by a newer lineardit, or edited; update lineardit, or copy the file again"
        )
    _check_keys("the file", entries, Manifest)
    for key in ("base", "base_revision", "base_license", "pipeline_class", "family"):
        _check(key, entries.get(key), (str, type(None)))
    _check("model_class", entries["model_class"], str)
    for pattern, shapes in _entries("attention", entries["attention"]).items():
        for shape, count in _entries(f"attention.{pattern}", shapes).items():
            _check(f"attention.{pattern}.{shape}", count, int)
    trained = _all_trained(_check("trained", entries.get("trained", []), list))
    tensors = entries.get("tensors")
    if tensors is not None:
        tensors = _record("tensors", TensorsFile, tensors, file=str, bytes=int, sha256=str)
        if tensors.file != TENSORS_FILE:
            raise ValueError(f"tensors.file must be {TENSORS_FILE!r}, got {tensors.file!r}")
    check_count("dense_below", entries.get("dense_below", 0), least=0)
    for key in ("methods", "versions"):
        _entries(key, entries[key])
    manifest = Manifest(**entries | {"trained": trained, "tensors": tensors})
    if set(manifest.methods) != set(manifest.attention):
        raise ValueError(
            f"methods and attention must name the same patterns, got {[*manifest.methods]} and {[*manifest.attention]}"
        )
    manifest.configs()
    return manifest


def _all_trained(items: list[Any]) -> tuple[Trained, ...]:
    trained = tuple(_trained(item) for item in items)
    if len({one.kind for one in trained}) < len(trained):
        raise ValueError(f"trained must name each kind once, got {[one.kind for one in trained]}")
    return trained


def _trained(item: Any) -> Trained:
    trained = _record("trained", Trained, item, kind=str, rank=(int, type(None)), alpha=(int, float, type(None)))
    if trained.kind not in ("lora", "full"):
        raise ValueError(f"trained.kind must be 'lora' or 'full', got {trained.kind!r}")
    rank, alpha = trained.rank, trained.alpha
    if trained.kind == "lora" and (rank is None or rank < 1 or alpha is None or not math.isfinite(alpha)):
        raise ValueError(f"trained of kind 'lora' needs rank >= 1 and a finite alpha, got {rank} and {alpha}")
    return trained


def _record(where: str, cls: Any, entries: Any, **kinds: Any) -> Any:
    entries = _entries(where, entries)
    _check_keys(where, entries, cls)
    for key, kind in kinds.items():
        _check(f"{where}.{key}", entries.get(key), kind)
    return cls(**entries)


def _entries(where: str, value: Any) -> dict[str, Any]:
    return _check(where, value, dict)


def _check(where: str, value: Any, kind: Any) -> Any:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{where} must be of type {names}, got {value!r}")
    return value


def _check_keys(where: str, entries: Mapping[str, Any], cls: Any) -> None:
    known = {field.name: field for field in fields(cls)}
    for key in entries:
        if key not in known:
            raise ValueError(
                f"unknown key {key!r} in {where}{did_you_mean(key, known)}; known keys: {', '.join(known)}"
            )
    missing = [name for name, field in known.items() if field.default is MISSING and name not in entries]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
