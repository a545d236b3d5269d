"""Options that several commands share, with the same wording and heading in `--help`."""

import math
from typing import Annotated

import typer

from ..pipelines.plan import MAX_STEPS
from .completion import backends, devices, dtypes, implementations, offloads

DRAWING = "Drawing"
STAGES = "Pictures in stages"
MODEL = "Model"
MACHINE = "Device, memory and speed"


def finite(number: float | None) -> float | None:
    """Return the number of an option, unchanged, if it is finite.

    Raises:
        typer.BadParameter: NaN or infinite.
    """
    if number is not None and not math.isfinite(number):
        raise typer.BadParameter(f"must be finite, got {number}")
    return number


def known_impl(impl: str) -> str:
    """Return the name of an implementation, unchanged, if some method has it.

    Raises:
        ValueError: no method has it.
    """
    if impl != "auto":
        from ..linearize.methods import check_impl_known

        check_impl_known(impl)
    return impl


Steps = Annotated[int | None, typer.Option(min=1, max=MAX_STEPS, help="Denoising steps; default: the pipeline's.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Picture i starts from the noise of seed + i.")]
Guidance = Annotated[float | None, typer.Option(callback=finite, help="guidance_scale; default: the pipeline's.")]

MaxSequenceLength = Annotated[
    int | None, typer.Option(min=1, help="Number of text tokens; default: the pipeline's.", rich_help_panel=DRAWING)
]
Arguments = Annotated[
    list[str] | None,
    typer.Option(
        "--argument",
        metavar="NAME=VALUE",
        help="A further argument of the pipeline's call, such as negative_prompt=blurry; repeatable.",
        rich_help_panel=DRAWING,
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:WEIGHT]",
        help="LoRA to load (safetensors file, folder or Hub id) and its weight, by default 1; repeatable.",
        rich_help_panel=DRAWING,
    ),
]

Strength = Annotated[
    float | None,
    typer.Option(help="Noise level of enlarged pictures, in (0, 1]; default: 0.3.", rich_help_panel=STAGES),
]
StageSteps = Annotated[
    int | None, typer.Option(help="Denoising steps of each stage after the first; default: 8.", rich_help_panel=STAGES)
]
Sharpen = Annotated[
    float | None,
    typer.Option(help="Strength of sharpening of enlarged pictures; 0: none; default: 1.", rich_help_panel=STAGES),
]
Tile = Annotated[
    int | None, typer.Option(help="Side of the VAE's tiles in pixels; default: 1024.", rich_help_panel=STAGES)
]

Base = Annotated[
    str | None, typer.Option(help="Base to use instead of the one that the adapter names.", rich_help_panel=MODEL)
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.", rich_help_panel=MODEL)]
Offline = Annotated[
    bool, typer.Option("--offline", help="Do not access the network; use the local cache.", rich_help_panel=MODEL)
]
Impl = Annotated[
    str,
    typer.Option(
        help="Implementation of converted attention.",
        rich_help_panel=MODEL,
        callback=known_impl,
        autocompletion=implementations,
    ),
]

Device = Annotated[
    str,
    typer.Option(help="Device; auto: a GPU if there is one.", rich_help_panel=MACHINE, autocompletion=devices),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Dtype of the weights: float32, bfloat16 or float16; auto: bfloat16 on a GPU, else float32.",
        rich_help_panel=MACHINE,
        autocompletion=dtypes,
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        metavar="BACKEND[:NAME=VALUE,...]",
        help="Quantize the denoiser with bitsandbytes_4bit, bitsandbytes_8bit, torchao or layerwise_casting, and "
        "settings of the backend.",
        rich_help_panel=MACHINE,
        autocompletion=backends,
    ),
]
Offload = Annotated[
    str,
    typer.Option(
        help="Offload weights to save GPU memory, at a cost in time: none, model, group or sequential.",
        rich_help_panel=MACHINE,
        autocompletion=offloads,
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(min=1, help="Pictures per batch; affects speed and memory only.", rich_help_panel=MACHINE),
]
ChunkTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="FLUX.1: run token-wise layers on this many tokens at a time; default: only if memory is short.",
        rich_help_panel=MACHINE,
    ),
]
