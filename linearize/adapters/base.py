"""The pretrained model that is converted: where it is, what its config files say, and its shape without its weights."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn

from ..errors import UnsupportedModelError
from ..families import FAMILIES, unsupported
from .config_entry import CONFIG_KEY
from .hub import is_repository, snapshot_of
from .license import license_of
from .manifest import MANIFEST_FILE
from .place import CONFIG_FILE, PIPELINE_FILE, Place, find_place

logger = logging.getLogger(__name__)

COMPONENTS = ("transformer", "unet")  # where a pipeline has its denoiser


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: Hub id, or absolute path of the folder or config file; None: not known, such as a model made in memory.
        revision: Commit of a Hub id; None: a folder.
        license: From the model card, or the first line of a LICENSE file; None: neither found.
        pipeline_class: None: this is a bare denoiser.
    """

    name: str | None = None
    revision: str | None = None
    license: str | None = None
    pipeline_class: str | None = None


@dataclass(frozen=True, kw_only=True)
class Base:
    """What the config files of a base say.

    Attributes:
        source: Where they were found.
        model_class: The denoiser's class.
        config: The denoiser's config.json.
        component: The denoiser's folder in the pipeline; None: this is a bare denoiser.
        vae_scale: Pixels per latent position, along one side.
        absent: Components that the pipeline was saved without.
    """

    source: Source
    model_class: str
    config: Mapping[str, Any]
    component: str | None = None
    vae_scale: int = 8
    absent: tuple[str, ...] = ()


def read_base(name: str | Path, *, revision: str | None = None, offline: bool = False) -> Base:
    """Read the config files and license of a pipeline or denoiser, or a bare config.json; no weights are fetched.

    Args:
        name: Folder, config file or Hub id.
        revision: Branch, tag or commit of a Hub id.
        offline: Do not access the network.
    Raises:
        UnsupportedModelError: a pipeline has no denoiser of diffusers' own classes.
        ValueError: not found, out of reach, damaged, or not in diffusers' format; the error says what to do.
    """
    place = find_place(name, revision=revision, offline=offline)
    if place.folder is not None and place.folder.is_file():
        index_file, config_file = None, place.folder
    else:
        index_file, config_file = place.file(PIPELINE_FILE), None
    component = pipeline_class = None
    index: dict[str, Any] = {}
    if index_file is not None:
        index = read_json(index_file)
        pipeline_class = index.get("_class_name")
        component = _component(index, index_file)
        config_file = place.file(f"{component}/{CONFIG_FILE}")
    elif config_file is None:
        config_file = place.file(CONFIG_FILE)
    if config_file is None:
        raise ValueError(_not_found_message(place, component))
    config = read_json(config_file)
    if not isinstance(config.get("_class_name"), str):
        raise ValueError(f"{config_file} has no _class_name: it is not a diffusers config")
    snapshot = snapshot_of(config_file)
    revision = snapshot[1] if place.folder is None and snapshot else None
    source = Source(name=place.name, revision=revision, license=license_of(place), pipeline_class=pipeline_class)
    vae_file = None if index_file is None else place.file(f"vae/{CONFIG_FILE}")
    vae_scale = _vae_scale(read_json(vae_file) if vae_file is not None else {})
    return Base(
        source=source,
        model_class=config["_class_name"],
        config=config,
        component=component,
        vae_scale=vae_scale,
        absent=tuple(name for name, entry in index.items() if entry == [None, None]),
    )


def source_of(pipe_or_model: Any, model: Any) -> Source:
    """Where a pipeline or denoiser in memory was loaded from, as far as it knows.

    Args:
        pipe_or_model: A pipeline or a denoiser.
        model: The denoiser.
    """
    pipeline_class = None if pipe_or_model is model else type(pipe_or_model).__name__
    # from the denoiser: the pipeline may have got it from elsewhere; diffusers records a folder or Hub id
    name = str(getattr(getattr(model, "config", None), "_name_or_path", None) or "")
    snapshot, folder = snapshot_of(Path(name)), Path(name).resolve()
    if snapshot is not None:
        place: Place | None = Place(name=snapshot[0], folder=None, revision=snapshot[1], offline=True)
    elif name and folder.is_dir():
        if pipeline_class is not None and (folder.parent / PIPELINE_FILE).is_file():
            folder = folder.parent
        place = Place(name=str(folder), folder=folder)
    else:
        place = _cached_place(name) if is_repository(name) else None
    if place is None:
        return Source(pipeline_class=pipeline_class)
    return Source(name=place.name, revision=place.revision, license=license_of(place), pipeline_class=pipeline_class)


def _cached_place(repository: str) -> Place | None:
    """A Hub repository at the commit of its default branch in the cache; None: it is not cached."""
    place = Place(name=repository, folder=None, offline=True)
    files = (place.file(name) for name in (CONFIG_FILE, *(f"{one}/{CONFIG_FILE}" for one in COMPONENTS)))
    snapshot = next((snapshot_of(file) for file in files if file is not None), None)
    return None if snapshot is None else replace(place, revision=snapshot[1])


def build_on_meta(base: Base, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The denoiser on the meta device, without memory for its weights.

    Args:
        dtype: Dtype of the weights.
    Raises:
        UnsupportedModelError: its class cannot be converted.
        ValueError: its config does not fit its class.
    """
    if base.model_class not in FAMILIES or not hasattr(diffusers, base.model_class):
        raise UnsupportedModelError(unsupported(base.model_class))
    config = {key: value for key, value in base.config.items() if key != CONFIG_KEY}
    try:
        with init_empty_weights(include_buffers=True):
            model = cast(nn.Module, getattr(diffusers, base.model_class).from_config(config))
    except (TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"the config of {base.source.name} does not fit a {base.model_class}: {error}") from error
    cast_as_loaded_(model, dtype)
    return model


def cast_as_loaded_(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters as `from_pretrained` does: to `dtype`, or to float32 where the class requires that."""
    keep_in_fp32 = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, weight in model.named_parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(torch.float32 if keep_in_fp32.intersection(name.split(".")) else dtype)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: it is damaged or holds something else.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy or download it again") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(entries).__name__}")
    return entries


def _component(index: Mapping[str, Any], index_file: Path) -> str:
    for name in COMPONENTS:
        entry = index.get(name)
        if isinstance(entry, list) and entry[0] is not None:
            if entry[0] != "diffusers":
                raise UnsupportedModelError(
                    f"{index_file}: its {name} is a {entry[1]} from {entry[0]}; only classes from diffusers are loaded"
                )
            return name
    raise UnsupportedModelError(f"{index_file} has no {' or '.join(COMPONENTS)}: nothing in this pipeline to convert")


def _vae_scale(config: Mapping[str, Any]) -> int:
    """Pixels per latent position, along one side, from a VAE's config.json."""
    scale = config.get("spatial_compression_ratio") or config.get("scale_factor_spatial")
    widths = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    return int(scale or (2 ** (len(widths) - 1) if widths else 8))


def _not_found_message(place: Place, component: str | None) -> str:
    if component is not None:
        return f"{place.name} has a {PIPELINE_FILE} but no {component}/{CONFIG_FILE}: the copy is incomplete"
    if place.offline:
        return (
            f"{place.name} is not in the local cache, and offline=True (--offline, HF_HUB_OFFLINE=1): load it once "
            "without offline, or pass a folder"
        )
    if place.file(MANIFEST_FILE) is not None:
        return f"{place.name} is an adapter, not a base: pass the base named in its {MANIFEST_FILE}"
    return (
        f"{place.name} has no {PIPELINE_FILE} or {CONFIG_FILE}, and no {MANIFEST_FILE} as an adapter would: pass a "
        "pipeline or a denoiser in diffusers format"
    )
