"""A shell's completions of option values (`lineardit --install-completion`)."""

from collections.abc import Iterable


def methods(incomplete: str) -> list[str]:
    """Names of methods."""
    from ..linearize.methods import METHODS

    return _starting_with(incomplete, [config.__name__.lower() for config in METHODS])


def implementations(incomplete: str) -> list[str]:
    """Names of implementations that some method has."""
    from ..linearize.methods import implementations as names

    return _starting_with(incomplete, names())


def offloads(incomplete: str) -> list[str]:
    """Ways of offloading."""
    from ..pipelines.placement import OFFLOADS

    return _starting_with(incomplete, OFFLOADS)


def backends(incomplete: str) -> list[str]:
    """Backends of quantization."""
    from ..linearize.adapters.quantization import BACKENDS

    return _starting_with(incomplete, BACKENDS)


def dtypes(incomplete: str) -> list[str]:
    """Dtypes of weights."""
    from ..linearize.adapters.opening import DTYPES

    return _starting_with(incomplete, ["auto", *DTYPES])


def devices(incomplete: str) -> list[str]:
    """Devices of this machine."""
    from .devices import available_devices

    return _starting_with(incomplete, ["auto", *available_devices()])


def _starting_with(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
