"""Published checkpoints of other projects, loaded onto the models they were trained for."""

from .clear import load_clear_checkpoint_ as load_clear_checkpoint_
from .linfusion import load_linfusion_checkpoint_ as load_linfusion_checkpoint_
