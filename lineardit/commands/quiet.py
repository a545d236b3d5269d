"""Silence the libraries, so that a command prints its own messages only."""

import logging
import warnings

import diffusers
import huggingface_hub
import transformers


def quiet_libraries() -> None:
    """Show only errors of diffusers and transformers, and none of the Hub's retries: its last error is reported."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
