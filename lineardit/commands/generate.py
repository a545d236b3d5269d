"""`lineardit generate`: pictures from prompts, with an adapter or with a base as it is."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import BatchSize, Device, Dtype, Impl, Offline, Revision, Seed, Steps
from .prompts import parse_size, read_prompts


def generate(
    source: Annotated[str, typer.Argument(metavar="ADAPTER_OR_BASE", help="Adapter or pipeline: Hub id or folder.")],
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="One picture each.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file, or a folder for several prompts.")] = Path(
        "out.png"
    ),
    prompt_file: Annotated[Path | None, typer.Option("--prompts", help="Text file, one prompt a line.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Pixels; else the model's own.")] = None,
    steps: Steps = 28,
    seed: Seed = 0,
    guidance: Annotated[float | None, typer.Option(help="guidance_scale; else the pipeline's own.")] = None,
    max_sequence_length: Annotated[int | None, typer.Option(help="Text tokens; else the pipeline's own.")] = None,
    batch_size: BatchSize = 1,
    base: Annotated[str | None, typer.Option(help="In place of the base that the adapter names.")] = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    offload: Annotated[str, typer.Option(help="Less GPU memory, slower: none, model, group or sequential.")] = "none",
    impl: Impl = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pictures that are there.")] = False,
    offline: Offline = False,
) -> None:
    """Make pictures. Each PNG says how it was made; noise of picture i comes from seed + i whatever the batch."""
    from .quiet import quiet_libraries

    quiet_libraries()
    from ..pipelines.generate import generate as generate_pictures
    from ..pipelines.generate import plan_files

    texts = [*(prompts or []), *(read_prompts(prompt_file) if prompt_file else [])]
    height_width = None if size is None else parse_size(size)
    plan_files(texts, output, seed=seed, text={})  # before a large model is loaded
    if output.is_file() and not overwrite:
        raise ValueError(f"{output} exists and is kept: name another output, or replace it with --overwrite")
    pipe, about = _load(source, base, revision, dtype, device, offload, impl, offline)
    began = time.perf_counter()
    drawing: dict[str, Any] = {"size": height_width, "steps": steps, "seed": seed, "guidance": guidance}
    drawing |= {"max_sequence_length": max_sequence_length, "batch_size": batch_size}
    files = generate_pictures(pipe, texts, output, **drawing, about=about, overwrite=overwrite)
    where = str(files[0]) if len(files) == 1 else f"{len(files)} pictures in {output}"
    print(f"{where}; {time.perf_counter() - began:.1f} s")


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
    from ..linearize.adapter import adapter_file
    from ..linearize.base import find_place, source_of
    from ..linearize.convert import denoiser
    from ..linearize.folders import sha256
    from ..linearize.opening import open_pipeline
    from ..linearize.standing import swap_report
    from ..pipelines.placement import place_
    from .devices import find_device, find_dtype

    target = find_device(device)
    weights = find_dtype(dtype, target)
    pipe = open_pipeline(source, dtype=weights, base=base, revision=revision, offline=offline, impl=impl)
    place_(pipe, target, offload)
    if swap_report(pipe) is None:  # else the conversion has said what it swapped
        print(f"{source} runs with its original attention")
    model = source_of(pipe, denoiser(pipe)[1]).name or source
    about = {"model": model, "dtype": weights, "lineardit": __version__}
    manifest = adapter_file(find_place(source, revision=revision, offline=offline))
    if manifest is not None:
        about |= {"adapter": source, "adapter_sha256": sha256(manifest)}
    return pipe, about
