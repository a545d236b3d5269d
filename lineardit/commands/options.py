"""Options that several commands share, with one wording."""

import math
from typing import Annotated

import typer


def _finite(number: float | None) -> float | None:
    if number is not None and not math.isfinite(number):
        raise typer.BadParameter(f"must be finite, got {number}")
    return number


Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never touch the network.")]
Impl = Annotated[str, typer.Option(help="The implementation that converted attention runs.")]
Dtype = Annotated[str, typer.Option(help="Of the weights; auto: bfloat16 on a GPU, else float32.")]
Device = Annotated[str, typer.Option(help="Where to compute; auto is a GPU if there is one.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps; else the pipeline's own.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Picture i starts from the noise of seed + i.")]
Guidance = Annotated[float | None, typer.Option(callback=_finite, help="guidance_scale; else the pipeline's own.")]
MaxSequenceLength = Annotated[int | None, typer.Option(min=1, help="Text tokens; else the pipeline's own.")]
ChunkTokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="FLUX.1: so many tokens at a time but in attention, for less memory; else where it is needed."
    ),
]
Strength = Annotated[
    float | None, typer.Option(help="Of a cascade: noise level that an enlarged picture gets, in (0, 1]; else 0.3.")
]
StageSteps = Annotated[
    int | None, typer.Option(help="Of a cascade: denoising steps of each stage after the first; else 8.")
]
Sharpen = Annotated[
    float | None, typer.Option(help="Of a cascade: how much sharper enlarged edges are made, 0: none; else 1.")
]
Tile = Annotated[int | None, typer.Option(help="Of a cascade: side in pixels of the VAE's tiles; else 1024.")]
Arguments = Annotated[
    list[str] | None,
    typer.Option(
        "--argument",
        metavar="NAME=VALUE",
        help="Another argument of the pipeline's call, such as negative_prompt=blurry; repeatable.",
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:WEIGHT]",
        help="A style to draw in, a LoRA: safetensors, folder or Hub id, and its weight, else 1; repeatable.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures at a time; changes speed and memory only.")]
