"""Attention of linear cost for pretrained diffusion models.

    pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16)
    lineardit.linearize_(pipe)  # the recommended hybrid, or a method: linearize_(pipe, lineardit.Clear(radius=16))
    with lineardit.dense(pipe):  # the original attention inside the block
        ...
    high = lineardit.HighResolutionPipeline.from_pipe(pipe)  # 4K to 8K, in stages
    lineardit.restore_(pipe)

Functions whose name ends in an underscore modify the pipeline in place. `save_adapter` saves a conversion,
`from_pretrained` loads it with its base. Public names are imported on first use, so `import lineardit` is cheap.
"""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .linearize.adapters.adapter import load_adapter_ as load_adapter_
    from .linearize.adapters.adapter import save_adapter as save_adapter
    from .linearize.adapters.loading import from_pretrained as from_pretrained
    from .linearize.adapters.merging import save_merged as save_merged
    from .linearize.adapters.publishing import push_to_hub as push_to_hub
    from .linearize.convert import dense as dense
    from .linearize.convert import linearize_ as linearize_
    from .linearize.convert import restore_ as restore_
    from .linearize.convert import set_impl_ as set_impl_
    from .linearize.errors import KernelNotReachedError as KernelNotReachedError
    from .linearize.errors import LayoutError as LayoutError
    from .linearize.errors import UnsupportedModelError as UnsupportedModelError
    from .linearize.first_steps import first_steps as first_steps
    from .linearize.methods import Agent as Agent
    from .linearize.methods import Clear as Clear
    from .linearize.methods import Hybrid as Hybrid
    from .linearize.methods import LinFusion as LinFusion
    from .linearize.methods import Mala as Mala
    from .linearize.methods import Neighborhood as Neighborhood
    from .linearize.methods import ProxyTokens as ProxyTokens
    from .linearize.methods import Rala as Rala
    from .linearize.methods import SlidingTile as SlidingTile
    from .linearize.report import SwapReport as SwapReport
    from .pipelines.high_resolution import HighResolutionPipeline as HighResolutionPipeline

__version__ = "0.1.0"

_PUBLIC_NAMES = {
    ".linearize.adapters.adapter": ("load_adapter_", "save_adapter"),
    ".linearize.adapters.loading": ("from_pretrained",),
    ".linearize.adapters.merging": ("save_merged",),
    ".linearize.adapters.publishing": ("push_to_hub",),
    ".linearize.convert": ("dense", "linearize_", "restore_", "set_impl_"),
    ".linearize.errors": ("KernelNotReachedError", "LayoutError", "UnsupportedModelError"),
    ".linearize.first_steps": ("first_steps",),
    ".linearize.methods": (
        "Agent",
        "Clear",
        "Hybrid",
        "LinFusion",
        "Mala",
        "Neighborhood",
        "ProxyTokens",
        "Rala",
        "SlidingTile",
    ),
    ".linearize.report": ("SwapReport",),
    ".pipelines.high_resolution": ("HighResolutionPipeline",),
}
_MODULE_OF = {name: module for module, names in _PUBLIC_NAMES.items() for name in names}
__all__ = sorted(_MODULE_OF)  # noqa: PLE0605 names that load on first use

_root = Path(__file__).parents[1]
if (_root / "pyproject.toml").is_file():  # a checkout: the subpackages are next to this folder
    __path__.append(str(_root))


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        # with name and obj, Python suggests a similar name
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    return getattr(import_module(_MODULE_OF[name], __name__), name)


def __dir__() -> list[str]:
    loaded = {name for name, value in globals().items() if isinstance(value, ModuleType) and value is not sys}
    return sorted({*_MODULE_OF, *loaded, *(name for name in globals() if name.startswith("__"))})
