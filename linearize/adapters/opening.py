"""Open a pipeline by name: an adapter, a saved converted pipeline, or a plain base."""

from pathlib import Path
from typing import Any

import torch

from ..errors import did_you_mean
from ..methods import check_impl_known
from .loading import load_base, load_converted
from .resolve import resolve_name

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
        dtype: Dtype of the weights.
        base: Folder or Hub id to load in place of the base that an adapter names.
        revision: Branch, tag or commit of `name` on the Hub.
        offline: Do not access the network.
        impl: The implementation that converted modules run.
        options: Those of `lineardit.from_pretrained`, including `weights=False`, or `quantization` as in `load_base`.
    Returns:
        The pipeline, on the CPU unless `device_map` is given.
    Raises:
        ValueError: missing, unreachable, damaged, not a pipeline, an unknown `impl`, or `base` given for something that
            is not an adapter.
    """
    check_impl_known(impl)
    resolved = resolve_name(name, base=base, revision=revision, offline=offline)
    if resolved.base.source.pipeline_class is None:
        raise ValueError(
            f"{resolved.base.source.name} is only a denoiser, which cannot generate images: pass the folder or Hub id "
            "of its pipeline; for an adapter, pass it as base (--base)"
        )
    if resolved.conversion is None:
        return load_base(resolved.base, dtype=dtype, offline=offline, **options)
    return load_converted(resolved, dtype=dtype, impl=impl, **options)


def named_dtype(name: str) -> torch.dtype:
    """The dtype of this name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}{did_you_mean(name, DTYPES)}")
    return DTYPES[name]
