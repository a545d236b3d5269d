"""The files of a base's weights and their dtypes, before they are loaded."""

import logging
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from ..folders import main_dtype
from .base import Base, read_json
from .place import PIPELINE_FILE, Place, find_place

logger = logging.getLogger(__name__)

_VARIANT_FILE = re.compile(r"diffusion_pytorch_model(?:-\d+-of-\d+)?\.(\w+)(?:-\d+-of-\d+)?\.safetensors")


def files_of_denoiser(base: Base, *, offline: bool = False) -> list[str] | None:
    """File names of the denoiser of a base from `read_base`; None: not known. Nothing is downloaded."""
    return _place(base, offline).names(base.component or "")


def variant_of(base: Base, names: Sequence[str]) -> str | None:
    """The variant of a denoiser's weights, such as "fp16", if they exist only as that variant; else None.

    Args:
        base: From `read_base`.
        names: File names of its denoiser.
    Raises:
        ValueError: it has only several variants, or only pickles, which are never loaded.
    """
    folder = _folder(base)
    if any(name.endswith(".bin") for name in names) and not any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"{folder} contains pickles (.bin), but only safetensors files are loaded: load it with diffusers and "
            "save it with safe_serialization=True"
        )
    if any(re.fullmatch(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors", name) for name in names):
        return None
    found = sorted({match[1] for name in names if (match := _VARIANT_FILE.fullmatch(name))})
    if len(found) > 1:
        raise ValueError(
            f"{folder} contains weights of several variants, {', '.join(found)}: pass one of them as variant= "
            "(in Python), or keep only one"
        )
    if not found:
        return None
    logger.info("%s: loading the variant %s, the only one available", folder, found[0])
    return found[0]


def check_has_weights(base: Base, names: Sequence[str], *, offline: bool = False) -> None:
    """Raise a ValueError if no file in `names`, the files of a denoiser, has weights."""
    if any(name.endswith(".safetensors") for name in names):
        return
    place = _place(base, offline)
    if place.folder is None and place.offline:
        raise ValueError(
            f"the weights of {_folder(base)} are not in the local cache, and offline=True (--offline, "
            "HF_HUB_OFFLINE=1): load them once without offline, or pass a folder that has them as base= (--base)"
        )
    raise ValueError(
        f"{_folder(base)} has a config but no weights, which is enough to convert, inspect and bench: to generate or "
        "train, pass a folder or Hub id that has weights; for an adapter, pass it as base= (--base)"
    )


def _place(base: Base, offline: bool) -> Place:
    return find_place(str(base.source.name), revision=base.source.revision, offline=offline)


def _folder(base: Base) -> str:
    """Where the files of a base's denoiser are."""
    return "/".join(filter(None, (base.source.name, base.component)))


def stored_dtype(base: Base, *, variant: str | None = None, offline: bool = False) -> torch.dtype:
    """The dtype of the denoiser's weights, from their file's header; if mixed, the one with the most bytes.

    Args:
        base: From `read_base`; for a Hub id, one file of weights is fetched, which loading needs anyway.
        variant: As in diffusers' `from_pretrained`.
        offline: Do not access the network.
    Raises:
        ValueError: there are no weights in safetensors files of the usual name.
    """
    place = _place(base, offline)
    file = _weights_file(place, base.component, SAFETENSORS_WEIGHTS_NAME, variant)
    if file is None:
        folder = f"{base.component}/" if base.component else ""
        name = _with_variant(SAFETENSORS_WEIGHTS_NAME, variant)
        raise ValueError(f"{place.name} has no {folder}{name} to read the dtype from: pass dtype (--dtype)")
    return main_dtype(file)


def stored_dtypes(base: Base, *, variant: str | None = None, offline: bool = False) -> dict[str, torch.dtype]:
    """The dtype of the weights of each part of a pipeline that has any, by the name of the part.

    Args:
        base: From `read_base`; for a Hub id, one file of weights of each part is fetched, which loading needs anyway.
        variant: As in diffusers' `from_pretrained`: the plain files are read of a part that lacks it.
        offline: Do not access the network.
    Raises:
        ValueError: a file is damaged.
    """
    place = _place(base, offline)
    index_file = place.file(PIPELINE_FILE)
    assert index_file is not None  # it was read before
    dtypes = {}
    for part, entry in read_json(index_file).items():
        if not isinstance(entry, list) or part in base.absent:
            continue
        names = product(dict.fromkeys((variant, None)), (SAFETENSORS_WEIGHTS_NAME, SAFE_WEIGHTS_NAME))
        files = (_weights_file(place, part, name, chosen) for chosen, name in names)
        file = next(filter(None, files), None)
        if file is not None:
            dtypes[part] = main_dtype(file)
    return dtypes


def _weights_file(place: Place, part: str | None, name: str, variant: str | None) -> Path | None:
    """The file of a part's weights, or one of several; None: there is none. `part` None: at the top."""
    folder = f"{part}/" if part else ""
    index = place.file(f"{folder}{name}.index{f'.{variant}' if variant else ''}.json")
    if index is not None:
        return place.file(f"{folder}{next(iter(read_json(index)['weight_map'].values()))}")
    return place.file(f"{folder}{_with_variant(name, variant)}")


def _with_variant(name: str, variant: str | None) -> str:
    stem = name.removesuffix(".safetensors")
    return f"{stem}.{variant}.safetensors" if variant else name
