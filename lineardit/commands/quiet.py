"""What a command says is its own: no loading bars and hints of the libraries below."""

import logging
import warnings

import diffusers
import huggingface_hub
import transformers


def quiet_libraries() -> None:
    """Leave only errors of diffusers and transformers, and of the Hub not even each try: its last error is told."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
