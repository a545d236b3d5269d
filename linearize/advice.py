"""What `linearize_` logs besides its report."""

import logging
from typing import Any

import diffusers
from packaging.version import Version
from torch import nn

from .families import FAMILIES
from .networks import networks
from .seam.conversion import conversion_of

logger = logging.getLogger(__name__)

TESTED_DIFFUSERS = ("0.35.0", "0.42.1")  # oldest and newest version that the tests of the seam ran on


def warn_unconverted_networks(pipe_or_model: Any, model: nn.Module) -> None:
    """Warn about other networks of a pipeline that could be converted but keep full attention."""
    if pipe_or_model is model:
        return
    for name, part in networks(pipe_or_model):
        convertible = any(cls.__name__ in FAMILIES for cls in type(part).__mro__)
        if convertible and part is not model and conversion_of(part) is None:
            logger.warning(
                "the pipeline's %s (a %s) keeps its full attention: linearize_(pipe.%s, ...) converts it as well",
                name,
                type(part).__name__,
                name,
            )


def warn_untested() -> None:
    """Warn if diffusers is older or newer than every version that the tests ran on."""
    oldest, newest = (Version(version) for version in TESTED_DIFFUSERS)
    if not oldest <= Version(diffusers.__version__) <= newest:
        logger.warning("lineardit was tested with diffusers %s to %s, found %s", oldest, newest, diffusers.__version__)
