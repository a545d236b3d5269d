"""Hooks into a stock pipeline: keep the scheduler's last output, and decode in tiles when memory runs out."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..linearize.errors import why_too_large

logger = logging.getLogger(__name__)


@contextmanager
def keep_last_output(pipe: Any) -> Iterator[list[Tensor]]:
    """Yield a list that holds, after a call of the pipeline, the last output of its scheduler."""
    outputs: list[Tensor] = []

    def keep(step: Any) -> Any:
        def kept(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            outputs[:] = [output[0]]
            return output

        return kept

    with _replace_method(pipe.scheduler, "step", keep):
        yield outputs


@contextmanager
def tiled_decoding_fallback(pipe: Any) -> Iterator[None]:
    """Inside, if pictures are too large for the VAE, decode again, one at a time and with diffusers' tiling."""
    vae: Any = getattr(pipe, "vae", None)
    if not hasattr(vae, "enable_tiling"):
        yield
        return

    def with_fallback(decode: Any) -> Any:
        def decoded(*args: Any, **kwargs: Any) -> Any:
            try:
                return decode(*args, **kwargs)
            except RuntimeError as error:
                reason = why_too_large(error)
                if vae.use_tiling or reason is None:
                    raise
                logger.warning("%s: the VAE decodes one picture at a time, in tiles", reason)
            torch.cuda.empty_cache()
            vae.enable_tiling()
            if hasattr(vae, "enable_slicing"):
                vae.enable_slicing()
            return decode(*args, **kwargs)

        return decoded

    with _replace_method(vae, "decode", with_fallback):
        yield


@contextmanager
def _replace_method(owner: Any, name: str, change: Any) -> Iterator[None]:
    """Inside, replace this method of one object by `change` of it."""
    before = vars(owner).get(name)
    setattr(owner, name, change(getattr(owner, name)))
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
