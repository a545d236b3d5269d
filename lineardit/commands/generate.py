"""`lineardit generate`: pictures from prompts, with an adapter or with a base as it is."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .prompts import parse_size, read_prompts


def generate(
    source: Annotated[str, typer.Argument(metavar="ADAPTER_OR_BASE", help="Adapter or pipeline: Hub id or folder.")],
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="One picture each.")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A .png file, or a folder for several prompts.")
    ] = Path("out.png"),
    prompt_file: Annotated[Path | None, typer.Option("--prompts", help="A file with one prompt a line.")] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="In pixels; the model's own if left out.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 28,
    seed: Annotated[int, typer.Option(help="Of the first picture; picture i has seed + i.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the pipeline's own if left out.")] = None,
    max_sequence_length: Annotated[
        int | None, typer.Option(help="Text tokens; the pipeline's own if left out.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--batch", help="Pictures at a time; changes speed only.")
    ] = 1,
    base: Annotated[str | None, typer.Option(help="Base to load in place of the one that the adapter names.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    offload: Annotated[
        str, typer.Option(help="Keep weights off the device: none, model, group or sequential.")
    ] = "none",
    impl: Annotated[str, typer.Option(help="Implementation of the new attention.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing pictures.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never touch the network.")] = False,
) -> None:
    """Make pictures. Each PNG says how it was made; noise of picture i comes from seed + i whatever the batch."""
    from ..pipelines.generate import generate as generate_pictures
    from ..pipelines.generate import plan_files

    texts = [*(prompts or []), *(read_prompts(prompt_file) if prompt_file else [])]
    wanted_size = None if size is None else parse_size(size)
    plan_files(texts, output, seed=seed, text={})  # before a large model is loaded
    if output.is_file() and not overwrite:
        raise ValueError(f"{output} exists and is kept: name another output, or replace it with --overwrite")
    pipe, about = _load(source, base, revision, dtype, device, offload, impl, offline)
    began = time.perf_counter()
    files = generate_pictures(
        pipe,
        texts,
        output,
        size=wanted_size,
        steps=steps,
        seed=seed,
        guidance=guidance,
        max_sequence_length=max_sequence_length,
        batch_size=batch_size,
        about=about,
        overwrite=overwrite,
    )
    seconds = time.perf_counter() - began
    where = str(files[0]) if len(files) == 1 else f"{len(files)} pictures in {output}"
    print(f"{where}; {seconds:.1f} s")


def _load(
    source: str,
    base: str | None,
    revision: str | None,
    dtype: str,
    device: str,
    offload: str,
    impl: str,
    offline: bool,
) -> tuple[Any, dict[str, str]]:
    """The pipeline in its place, and what its pictures say of it."""
    from .. import __version__
    from ..linearize.base import find_place, source_of
    from ..linearize.convert import denoiser
    from ..linearize.folders import sha256
    from ..linearize.manifest import MANIFEST_FILE
    from ..linearize.opening import open_pipeline
    from ..linearize.standing import describe_attention
    from ..pipelines.placement import place_
    from .devices import find_device, find_dtype

    target = find_device(device)
    pipe = open_pipeline(
        source, dtype=find_dtype(dtype, target), base=base, revision=revision, offline=offline, impl=impl
    )
    place_(pipe, target, offload)
    print(f"{source} on {target}: {describe_attention(pipe)}")
    about = {"model": source_of(pipe, denoiser(pipe)[1]).name or source, "lineardit": __version__}
    manifest = find_place(source, revision=revision, offline=offline).file(MANIFEST_FILE)
    if manifest is not None:
        about |= {"adapter": source, "adapter_sha256": sha256(manifest)}
    return pipe, about
