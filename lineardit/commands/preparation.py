"""`lineardit prepare`: the teacher makes the samples that its student learns from."""

from pathlib import Path
from typing import Annotated

import typer

from .prompts import parse_size, read_prompts


def prepare(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The teacher, a pipeline in diffusers' format: Hub id or folder.")
    ],
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt a line, one sample each.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of samples; an interrupted one is resumed.")],
    size: Annotated[
        list[str], typer.Option(metavar="WIDTHxHEIGHT", help="Pixels; repeat it to go round several sizes.")
    ] = ["1024x1024"],  # noqa: B006, typer copies it
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 28,
    guidance: Annotated[float, typer.Option(help="The pipeline's guidance_scale.")] = 3.5,
    seed: Annotated[int, typer.Option(help="Sample i starts from the noise of seed + i.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Samples at a time; changes speed only.")] = 4,
    max_sequence_length: Annotated[int, typer.Option(help="Text tokens.")] = 512,
    dtype: Annotated[str, typer.Option(help="Of the weights; auto: bfloat16 on a GPU, else float32.")] = "auto",
    device: Annotated[str, typer.Option(help="Where the teacher runs; auto is a GPU if there is one.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never touch the network.")] = False,
) -> None:
    """Let the teacher make training samples. Final latents and prompt embeddings, in shards; resumable."""
    sizes = [parse_size(text) for text in size]
    texts = read_prompts(prompts)

    from ..distill.prepare import prepare as make_samples
    from ..linearize.opening import open_pipeline
    from .devices import find_device, find_dtype

    place = find_device(device)
    pipe = open_pipeline(base, dtype=find_dtype(dtype, place), revision=revision, offline=offline).to(place)
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
    )
