"""`lineardit prepare`: record the teacher's samples for training a student."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    MACHINE,
    Arguments,
    Device,
    Dtype,
    Guidance,
    MaxSequenceLength,
    Offline,
    Offload,
    Quantize,
    Revision,
    Seed,
    Steps,
)
from .prompts import parse_arguments, parse_part, parse_quantization, parse_size, read_prompts


def prepare(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The teacher, a pipeline in diffusers' format: Hub id or folder.")
    ],
    prompts: Annotated[Path, typer.Option(help="Text file with one prompt per line, one sample each.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of samples; resumed if it exists.")],
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WIDTHxHEIGHT", help="Size in pixels; repeat to cycle through several. Default: the model's."
        ),
    ] = None,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    calls: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Number of calls of the denoiser to record per picture, for any model; 0: its final latents, for "
            "FLUX.1. Default: 0 for FLUX.1, 4 for others.",
        ),
    ] = None,
    max_sequence_length: MaxSequenceLength = None,
    arguments: Arguments = None,
    revision: Revision = None,
    offline: Offline = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Offload = "none",
    quantize: Quantize = None,
    batch_size: Annotated[
        int,
        typer.Option(
            rich_help_panel=MACHINE,
            min=1,
            help="Pictures per batch, for final latents (calls: one at a time). Affects speed only.",
        ),
    ] = 4,
    shard_size: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=MACHINE,
            min=1,
            help="Samples per file, kept in memory until written; default: 64, or 8 with calls.",
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=MACHINE,
            metavar="I/N",
            help="Only every N-th shard, starting at the I-th; processes of a launcher share the part.",
        ),
    ] = None,
) -> None:
    """Record training samples of the teacher. Final latents, or calls of its denoiser, in shards; resumable.

    On N GPUs: accelerate launch --multi_gpu --num_processes N -m lineardit prepare ...
    On several machines, use --part.
    """
    share = parse_part(part)
    sizes = [parse_size(text) for text in size] if size else None
    texts, extra_arguments = read_prompts(prompts), parse_arguments(arguments)
    from .quiet import quiet_libraries

    quiet_libraries()
    from ..distill.prepare import prepare as make_samples
    from ..linearize.folders import check_writable
    from .devices import find_device, find_dtype
    from .loading import open_on_device

    weights: dict[str, Any] = {"quantization": parse_quantization(quantize)}
    check_writable(output)  # before a large model is loaded
    place = find_device(device)
    weights |= {"dtype": find_dtype(dtype, place), "revision": revision, "offline": offline}
    pipe = open_on_device(base, device=place, offload=offload, **weights)
    make_samples(
        pipe,
        texts,
        output,
        sizes=sizes,
        steps=steps,
        guidance=guidance,
        seed=seed,
        batch_size=batch_size,
        max_sequence_length=max_sequence_length,
        calls=calls,
        arguments=extra_arguments,
        shard_size=shard_size,
        part=share,
    )
