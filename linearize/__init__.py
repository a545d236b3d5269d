"""What replaces attention, and how it gets into a model."""

from .compiling import compile_ as compile_
from .convert import denoiser as denoiser
from .convert import dense as dense
from .convert import linearize_ as linearize_
from .convert import restore_ as restore_
from .convert import set_impl_ as set_impl_
from .convert import swapped as swapped
from .errors import KernelNotReachedError as KernelNotReachedError
from .errors import LayoutError as LayoutError
from .errors import UnsupportedModelError as UnsupportedModelError
from .families import Family as Family
from .families import Sight as Sight
from .first_steps import first_steps as first_steps
from .layout import Layout as Layout
from .methods import Agent as Agent
from .methods import Clear as Clear
from .methods import LinFusion as LinFusion
from .methods import Mala as Mala
from .methods import Neighborhood as Neighborhood
from .methods import Rala as Rala
from .methods import SlidingTile as SlidingTile
from .report import SwapReport as SwapReport
