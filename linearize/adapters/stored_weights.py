"""The files of a base's weights and their dtype, before they are loaded."""

import logging
import re
from collections.abc import Sequence

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from ..folders import main_dtype
from .base import Base, read_json
from .place import Place, find_place

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
    folder, variant_suffix = f"{base.component}/" if base.component else "", f".{variant}" if variant else ""
    stem = SAFETENSORS_WEIGHTS_NAME.removesuffix(".safetensors")
    index = place.file(f"{folder}{SAFETENSORS_WEIGHTS_NAME}.index{variant_suffix}.json")
    name = f"{stem}{variant_suffix}.safetensors"
    if index is not None:
        name = next(iter(read_json(index)["weight_map"].values()))
    file = place.file(f"{folder}{name}")
    if file is None:
        raise ValueError(f"{place.name} has no {folder}{name} to read the dtype from: pass dtype (--dtype)")
    return main_dtype(file)
