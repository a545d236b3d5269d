"""What a command says is its own: no loading bars and hints of the libraries below."""

import warnings

import diffusers
import transformers


def quiet_libraries() -> None:
    """Leave only errors of diffusers and transformers."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
