"""A pipeline by its name, whatever that names: an adapter, a saved converted pipeline, or a plain base."""

from pathlib import Path
from typing import Any

import diffusers
import torch

from ..errors import nearest
from ..methods import check_impl_known
from .adapter import adapter_file
from .base import read_base
from .config_entry import CONFIG_KEY
from .loading import from_pretrained, load_base
from .place import find_place

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_pipeline(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    base: str | Path | None = None,
    revision: str | None = None,
    offline: bool = False,
    impl: str = "auto",
    **options: Any,
) -> Any:
    """Load an adapter with its base, a converted pipeline, or an unconverted one.

    Args:
        name: Folder or Hub id.
        dtype: Of the weights.
        base: To load in place of the base that an adapter names.
        revision: Branch, tag or commit of `name` on the Hub.
        offline: Never touch the network.
        impl: The implementation that converted modules run.
        options: As of `lineardit.from_pretrained`, `weights=False` as well; or `quantization`, as of `load_base`.
    Returns:
        The pipeline, on the CPU without a `device_map`.
    Raises:
        ValueError: missing, out of reach, damaged, no pipeline, no such `impl`, or `base` beside something that is no
            adapter.
    """
    check_impl_known(impl)
    place = find_place(name, revision=revision, offline=offline)
    is_adapter = adapter_file(place) is not None
    plain = None if is_adapter or not place.holds_a_model() else read_base(name, revision=revision, offline=offline)
    if plain is None or CONFIG_KEY in plain.config:
        placed: dict[str, Any] = {"base": base, "revision": revision, "offline": offline, **options}
        pipe = from_pretrained(name, dtype=dtype, impl=impl, **placed)
    elif base is not None:
        raise ValueError(f"base is for adapters, and {name} is a whole model: leave base out")
    elif plain.source.pipeline_class is None:
        raise ValueError(f"{name} is a denoiser alone: give the folder or Hub id of the pipeline it belongs to")
    else:
        pipe = load_base(plain, dtype=dtype, offline=offline, **options)
    if not isinstance(pipe, diffusers.DiffusionPipeline):
        raise ValueError(f"{name} belongs to a denoiser alone, which makes no pictures: pass a pipeline as base")
    return pipe


def named_dtype(name: str) -> torch.dtype:
    """The dtype of weights that has this name.

    Raises:
        ValueError: there is none.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}{nearest(name, DTYPES)}")
    return DTYPES[name]
