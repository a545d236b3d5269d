"""`lineardit prepare`: the teacher makes the samples that its student learns from."""

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
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt a line, one sample each.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of samples; an interrupted one is resumed.")],
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="WIDTHxHEIGHT", help="Pixels; repeat it to go round several sizes. Else the model's own."),
    ] = None,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    calls: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Keep so many calls of the denoiser of each picture, for any model; 0: its final latents, for FLUX.1. "
            "Else 0 for FLUX.1 and 4 for others.",
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
            help="Pictures at a time, of final latents; with calls, one. Changes speed only.",
        ),
    ] = 4,
    shard_size: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=MACHINE,
            min=1,
            help="Samples a file, in memory until it is written; else 64, or 8 where calls are kept.",
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=MACHINE,
            metavar="I/N",
            help="Only every N-th shard, from the I-th on; the processes of a launcher share it.",
        ),
    ] = None,
) -> None:
    """Let the teacher make training samples. Final latents, or calls of its denoiser, in shards; resumable.

    On N GPUs: accelerate launch --multi_gpu --num_processes N -m lineardit prepare ...; on several machines --part.
    """
    share = parse_part(part)
    sizes = [parse_size(text) for text in size] if size else None
    texts, more = read_prompts(prompts), parse_arguments(arguments)
    from .quiet import quiet_libraries

    quiet_libraries()
    from ..distill.prepare import prepare as make_samples
    from ..linearize.folders import check_writable
    from .devices import find_device, find_dtype
    from .loading import open_in_place

    weights: dict[str, Any] = {"quantization": parse_quantization(quantize)}
    check_writable(output)  # before a large model is loaded
    place = find_device(device)
    weights |= {"dtype": find_dtype(dtype, place), "revision": revision, "offline": offline}
    pipe = open_in_place(base, device=place, offload=offload, **weights)
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
        arguments=more,
        shard_size=shard_size,
        part=share,
    )
