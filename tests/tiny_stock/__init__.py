"""diffusers' own pipelines around the tiny models, a line for each, with the arguments of a call.

They are called with embeddings and have no text encoders, which no test needs.
"""

from typing import Any

import torch
from torch import Tensor

from .controlnets import CONTROLNETS
from .joint_latents import JOINT_LATENTS
from .latents import LATENTS
from .positions import POSITIONS
from .refused import REFUSED as REFUSED
from .sequences import SEQUENCES
from .stock import Arguments, Stock

STOCK: dict[str, Stock] = {**POSITIONS, **LATENTS, **JOINT_LATENTS, **SEQUENCES, **CONTROLNETS}


def paint(pipe: Any, arguments: Arguments) -> Tensor:
    """Two steps from one seed; returns final latents, or pictures if a pipeline returns no latents."""
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)  # some draw a reference picture's latents from torch's global generator
    options = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    out = pipe(**{**options, **arguments}, return_dict=False)[0]
    if isinstance(out, list):
        return torch.cat(out)
    return out if isinstance(out, Tensor) else torch.as_tensor(out)
