"""Logs which kernels run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..linearize.networks import denoiser
from ..linearize.what_runs import describe_implementations, implementations_seen

logger = logging.getLogger(__name__)


@contextmanager
def kernels_told(pipe_or_model: Any, what: str = "") -> Iterator[None]:
    """Inside, the first forward of a converted model logs which implementations it ran, after `what`."""
    _, model = denoiser(pipe_or_model)
    with implementations_seen(model) as seen:

        def tell(*_: Any) -> None:
            handle.remove()
            logger.info("%skernel: %s", f"{what}, " if what else "", describe_implementations(seen, model))

        handle = model.register_forward_hook(tell)
        try:
            yield
        finally:
            handle.remove()
