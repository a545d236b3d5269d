"""The lines of the table of stock pipelines, and the parts that they share.

Two prompts of 6 and 4 tokens, for a picture of 4 x 6 tokens: the shorter prompt is padded, and masked where a pipeline
takes a mask.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

Arguments = dict[str, Any]
TEXT_LEN = 6
LENGTHS = {"": (6, 4), "negative_": (3, 5)}  # of the two prompts, and of their negative ones


@dataclass(frozen=True, kw_only=True)
class Stock:
    """A pipeline of diffusers.

    Attributes:
        needs: Its class in diffusers; left out if the installed diffusers has no such class.
        make: -> the pipeline, with random weights.
        arguments: -> arguments of its call, besides steps and generator.
        others: Networks of the pipeline that are converted besides its denoiser.
        biased: Full attention adds the mask to the scores, whereas a forced implementation hides tokens with it.
    """

    needs: str
    make: Callable[[], Any]
    arguments: Callable[[], Arguments]
    others: tuple[str, ...] = ()
    biased: bool = False


class TextEncoder(nn.Module):
    """A stand-in where pipelines ask for dtype and device of their text encoder."""

    dtype = torch.float32
    device = torch.device("cpu")


def pipeline(name: str, **parts: Any) -> Any:
    """diffusers' pipeline of this class; its encoders and tokenizers are None."""
    cls = getattr(diffusers, name)
    needed, _ = cls._get_signature_keys(cls)
    return cls(**(dict.fromkeys(needed) | parts))


def euler() -> Any:
    """The scheduler of most models that are trained by flow matching."""
    return diffusers.FlowMatchEulerDiscreteScheduler()


def vae(channels: int, *, blocks: int = 2) -> Any:
    """Two by two pixels for each latent; with four blocks, eight by eight."""
    return diffusers.AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=4,
        layers_per_block=1,
        shift_factor=0.0,
    ).eval()


def size(pixels: int) -> Arguments:
    """4 x 6 tokens with a side of `pixels`."""
    return {"height": 4 * pixels, "width": 6 * pixels}


def padded(sign: str, *shape: int, text_len: int = TEXT_LEN) -> Tensor:
    """Embeddings [2, text_len, *shape] of two prompts, zero beyond the end of a prompt."""
    return torch.randn(2, text_len, *shape) * mask(sign, text_len).view(2, text_len, *[1] * len(shape))


def mask(sign: str, text_len: int = TEXT_LEN) -> Tensor:
    """[2, text_len] int64, 1 = a token of the prompt."""
    return (torch.arange(text_len) < torch.tensor(LENGTHS[sign])[:, None]).long()


def prompts(*shape: int, masks: str | None = None, negative_len: int = TEXT_LEN, pooled: int = 0) -> Arguments:
    """Embeddings of two prompts and two negative ones.

    Args:
        shape: What follows [2, tokens]: the width.
        masks: Name of the argument for the mask; None: the pipeline has none.
        negative_len: Length of the negative prompts; some pipelines join them with the others.
        pooled: Width of the pooled embeddings; 0: none.
    """
    arguments: Arguments = {}
    for sign, text_len in (("", TEXT_LEN), ("negative_", negative_len)):
        arguments[f"{sign}prompt_embeds"] = padded(sign, *shape, text_len=text_len)
        if masks is not None:
            arguments[f"{sign}{masks}"] = mask(sign, text_len)
        if pooled:
            arguments[f"{sign}pooled_prompt_embeds"] = torch.randn(2, pooled)
    return arguments
