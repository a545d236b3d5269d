"""The lines of the table of tiny models, and how a model and its arguments are made from one."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lineardit.linearize.measures.named_inputs import inputs_by_name, with_values

Grid = tuple[int, int]
Arguments = dict[str, Any]

# Config values by name: diffusers' models use the same names for the same things
SMALL = {
    "attention_head_dim": 16,
    "axes_dim_rope": (4, 4, 8),
    "axes_dims": (4, 4, 8),
    "axes_dims_rope": (4, 4, 8),
    "cap_feat_dim": 16,
    "caption_channels": 32,
    "caption_projection_dim": 32,
    "condition_dim": 4,
    "context_in_dim": 16,
    "cross_attention_dim": 32,
    "cross_attention_dim_t5": 32,
    "dim": 32,
    "ffn_dim": 32,
    "hidden_size": 32,
    "in_channels": 4,
    "intermediate_size": 32,
    "joint_attention_dim": 32,
    "multiple_of": 16,
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_refiner_layers": 1,
    "norm_num_groups": 8,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_key_value_heads": 1,
    "num_kv_heads": 1,
    "num_refiner_layers": 1,
    "out_channels": 4,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 32,
    "rope_axes_dim": (4, 4, 8),
    "sample_size": 16,
    "text_dim": 16,
    "text_embed_dim": 32,
    "text_len": 4,
    "text_len_t5": 4,
    "time_embed_dim": 8,
}
# Config names for numbers of blocks: one each if there are several kinds, else two
LAYERS = (
    "depth",
    "layers_per_block",
    "n_layers",
    "num_layers",
    "num_mmdit_layers",
    "num_single_dit_layers",
    "num_single_layers",
    "num_visual_blocks",
    "transformer_num_layers",
)


def no_arguments(grid: Grid, text_len: int, batch: int) -> Arguments:
    """Every argument is known by its name."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A class of models.

    Attributes:
        needs: Its name in diffusers; left out if the installed diffusers has no such class.
        config: Values that differ from `SMALL` and from diffusers' defaults.
        inputs: (token grid, length of the text, batch) -> forward arguments that differ from `inputs_by_name`.
        num_attention: Number of the image's self-attention modules at the default number of layers.
    """

    needs: str
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[Grid, int, int], Arguments] = no_arguments
    num_attention: int = 2

    def make(self, num_layers: int | None = None, **config: Any) -> nn.Module:
        """A model with random weights.

        Args:
            num_layers: Number of each kind of block.
            config: Overrides of the table's values.
        """
        return fill_zeros(self._class(**self._config(num_layers) | config))

    def arguments(self, grid: Grid, text_len: int, batch: int) -> Arguments:
        """Arguments of one forward, with random numbers."""
        others = self.inputs(grid, text_len, batch)
        parameters = inspect.signature(self._class.__init__).parameters
        config = {name: parameter.default for name, parameter in parameters.items()} | self._config(None)
        named = inputs_by_name(self._class, config, grid, text_len=text_len, batch=batch, omit=others)
        numbered = partial(with_values, device=torch.device("cpu"), dtype=torch.float32)
        return tree_map_only(Tensor, numbered, named) | others

    @property
    def _class(self) -> Any:
        return getattr(diffusers, self.needs)

    def _config(self, num_layers: int | None) -> Arguments:
        names = inspect.signature(self._class.__init__).parameters
        layers = [name for name in LAYERS if name in names]
        small = {name: value for name, value in SMALL.items() if name in names}
        if num_layers is not None:
            return {**small, **self.config, **dict.fromkeys(layers, num_layers)}
        return {**small, **dict.fromkeys(layers, 2 if len(layers) == 1 else 1), **self.config}


def fill_zeros(model: nn.Module) -> nn.Module:
    """Replace weights that are initialized to 0 (outputs, modulations), which would hide the attention."""
    for weight in model.parameters():
        if not weight.is_meta and not weight.any():
            nn.init.normal_(weight, std=0.1)
    return model
