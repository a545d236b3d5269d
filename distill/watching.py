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
def last_step(pipe: Any) -> Iterator[list[Tensor]]:
    """Yield a list that holds, after a call of the pipeline, the last output of its scheduler."""
    made: list[Tensor] = []

    def keep(step: Any) -> Any:
        def kept(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            made[:] = [output[0]]
            return output

        return kept

    with _replaced(pipe.scheduler, "step", keep):
        yield made


@contextmanager
def decoding_in_tiles_at_need(pipe: Any) -> Iterator[None]:
    """Inside, if pictures are too large for the VAE, decode again, one at a time and with diffusers' tiling."""
    vae: Any = getattr(pipe, "vae", None)
    if not hasattr(vae, "enable_tiling"):
        yield
        return

    def twice(decode: Any) -> Any:
        def decoded(*args: Any, **kwargs: Any) -> Any:
            try:
                return decode(*args, **kwargs)
            except RuntimeError as error:
                why = why_too_large(error)
                if vae.use_tiling or why is None:
                    raise
                logger.warning("%s: the VAE decodes one picture at a time, in tiles", why)
            torch.cuda.empty_cache()
            vae.enable_tiling()
            if hasattr(vae, "enable_slicing"):
                vae.enable_slicing()
            return decode(*args, **kwargs)

        return decoded

    with _replaced(vae, "decode", twice):
        yield


@contextmanager
def _replaced(owner: Any, name: str, change: Any) -> Iterator[None]:
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
