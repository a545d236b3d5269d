"""Logs which kernels run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..linearize.describe import count_implementations, describe_implementations
from ..linearize.networks import denoiser

logger = logging.getLogger(__name__)


@contextmanager
def log_kernels(pipe_or_model: Any, label: str = "") -> Iterator[None]:
    """Inside, the first forward of a converted model logs which implementations it ran, after `what`."""
    _, model = denoiser(pipe_or_model)
    with count_implementations(model) as counts:

        def log(*_: Any) -> None:
            handle.remove()
            logger.info("%skernel: %s", f"{label}, " if label else "", describe_implementations(counts, model))

        handle = model.register_forward_hook(log)
        try:
            yield
        finally:
            handle.remove()
