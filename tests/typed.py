"""The command line, as it is typed."""

from typing import Any

from lineardit.cli import run


def lineardit(*arguments: Any) -> int:
    """The exit code of `lineardit ARGUMENTS`, each of them as text."""
    return run([str(argument) for argument in arguments])
