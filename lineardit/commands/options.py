"""Options that several commands share, with one wording, under one heading of `--help`."""

import math
from typing import Annotated

import typer

from ..pipelines.plan import MOST_STEPS
from .completion import backends, devices, dtypes, implementations, offloads

DRAWING = "Drawing"
STAGES = "Pictures in stages"
MODEL = "Model"
MACHINE = "Device, memory and speed"


def finite(number: float | None) -> float | None:
    """The number of an option, as it is, if it is one.

    Raises:
        typer.BadParameter: NaN or infinite.
    """
    if number is not None and not math.isfinite(number):
        raise typer.BadParameter(f"must be finite, got {number}")
    return number


def known(impl: str) -> str:
    """The name of an implementation, as it is, if some method has one.

    Raises:
        ValueError: there is none.
    """
    if impl != "auto":
        from ..linearize.methods import check_impl_known

        check_impl_known(impl)
    return impl


Steps = Annotated[int | None, typer.Option(min=1, max=MOST_STEPS, help="Denoising steps; else the pipeline's own.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Picture i starts from the noise of seed + i.")]
Guidance = Annotated[float | None, typer.Option(callback=finite, help="guidance_scale; else the pipeline's own.")]

MaxSequenceLength = Annotated[
    int | None, typer.Option(min=1, help="Text tokens; else the pipeline's own.", rich_help_panel=DRAWING)
]
Arguments = Annotated[
    list[str] | None,
    typer.Option(
        "--argument",
        metavar="NAME=VALUE",
        help="Another argument of the pipeline's call, such as negative_prompt=blurry; repeatable.",
        rich_help_panel=DRAWING,
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:WEIGHT]",
        help="A style to draw in, a LoRA: safetensors, folder or Hub id, and its weight, else 1; repeatable.",
        rich_help_panel=DRAWING,
    ),
]

Strength = Annotated[
    float | None,
    typer.Option(help="Noise level that an enlarged picture gets, in (0, 1]; else 0.3.", rich_help_panel=STAGES),
]
StageSteps = Annotated[
    int | None, typer.Option(help="Denoising steps of each stage after the first; else 8.", rich_help_panel=STAGES)
]
Sharpen = Annotated[
    float | None,
    typer.Option(help="How much sharper enlarged edges are made, 0: none; else 1.", rich_help_panel=STAGES),
]
Tile = Annotated[int | None, typer.Option(help="Side in pixels of the VAE's tiles; else 1024.", rich_help_panel=STAGES)]

Base = Annotated[str | None, typer.Option(help="In place of the base that the adapter names.", rich_help_panel=MODEL)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.", rich_help_panel=MODEL)]
Offline = Annotated[bool, typer.Option("--offline", help="Never touch the network.", rich_help_panel=MODEL)]
Impl = Annotated[
    str,
    typer.Option(
        help="The implementation that converted attention runs.",
        rich_help_panel=MODEL,
        callback=known,
        autocompletion=implementations,
    ),
]

Device = Annotated[
    str,
    typer.Option(
        help="Where to compute; auto is a GPU if there is one.", rich_help_panel=MACHINE, autocompletion=devices
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Of the weights: float32, bfloat16 or float16; auto: bfloat16 on a GPU, else float32.",
        rich_help_panel=MACHINE,
        autocompletion=dtypes,
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        metavar="BACKEND[:NAME=VALUE,...]",
        help="The denoiser's weights in fewer bits: bitsandbytes_4bit, bitsandbytes_8bit, torchao or "
        "layerwise_casting, and settings of it.",
        rich_help_panel=MACHINE,
        autocompletion=backends,
    ),
]
Offload = Annotated[
    str,
    typer.Option(
        help="Less GPU memory, slower: none, model, group or sequential.",
        rich_help_panel=MACHINE,
        autocompletion=offloads,
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(min=1, help="Pictures at a time; changes speed and memory only.", rich_help_panel=MACHINE),
]
ChunkTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="FLUX.1: so many tokens at a time but in attention, for less memory; else where it is needed.",
        rich_help_panel=MACHINE,
    ),
]
