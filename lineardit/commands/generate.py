"""`lineardit generate`: pictures from prompts, with an adapter or an unconverted base."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .loras import parse_loras
from .options import (
    DRAWING,
    MACHINE,
    STAGES,
    Arguments,
    Base,
    BatchSize,
    ChunkTokens,
    Device,
    Dtype,
    Guidance,
    Impl,
    Loras,
    MaxSequenceLength,
    Offline,
    Offload,
    Quantize,
    Revision,
    Seed,
    Sharpen,
    StageSteps,
    Steps,
    Strength,
    Tile,
)
from .prompts import parse_arguments, parse_part, parse_quantization, parse_size, read_prompts

if TYPE_CHECKING:
    from ..pipelines.plan import Settings


def generate(
    source: Annotated[str, typer.Argument(metavar="ADAPTER_OR_BASE", help="Adapter or pipeline: Hub id or folder.")],
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="Prompts, one picture each.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file, or a folder for several pictures.")] = Path(
        "out.png"
    ),
    size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Size in pixels; default: the model's.")
    ] = None,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompts", help="Text file with one prompt per line.")] = None,
    count: Annotated[
        int,
        typer.Option(
            min=1, max=10_000, help="Pictures per prompt, written to a folder; the list of prompts is repeated."
        ),
    ] = 1,
    plan: Annotated[bool, typer.Option("--plan", help="Print the plan without generating; reads no weights.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing pictures.")] = False,
    max_sequence_length: MaxSequenceLength = None,
    stochastic: Annotated[
        bool,
        typer.Option(
            "--stochastic",
            help="Fresh noise in each step (in a cascade, of the first stage); for flow-matching models.",
            rich_help_panel=DRAWING,
        ),
    ] = False,
    arguments: Arguments = None,
    lora: Loras = None,
    cascade: Annotated[
        bool | None,
        typer.Option(
            "--cascade/--direct",
            help="Generate in stages from the native size, or directly; default: in stages if the size needs them.",
            rich_help_panel=STAGES,
        ),
    ] = None,
    strength: Strength = None,
    stage_steps: StageSteps = None,
    sharpen: Sharpen = None,
    tile: Tile = None,
    base: Base = None,
    revision: Revision = None,
    impl: Impl = "auto",
    offline: Offline = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Offload = "none",
    quantize: Quantize = None,
    chunk_tokens: ChunkTokens = None,
    batch_size: BatchSize = 1,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Only every N-th picture, starting at the I-th; processes of a launcher share the part.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
) -> None:
    """Generate pictures. Each PNG records how it was made; the noise of picture i depends only on seed + i.

    On N GPUs: accelerate launch --multi_gpu --num_processes N -m lineardit generate ...
    On several machines, use --part.
    """
    share, extra_arguments, loras = parse_part(part), parse_arguments(arguments), parse_loras(lora)
    texts = [*(prompts or []), *(read_prompts(prompt_file) if prompt_file else [])] * count
    planned: dict[str, Any] = {"size": None if size is None else parse_size(size), "steps": steps, "cascade": cascade}
    planned |= {"max_sequence_length": max_sequence_length, "chunk_tokens": chunk_tokens}
    fresh = {"stochastic": "True"} if stochastic else {}
    from .quiet import quiet_libraries

    quiet_libraries()
    from ..pipelines.fresh_noise import with_fresh_noise
    from ..pipelines.generate import generate as generate_pictures
    from ..pipelines.plan import Plan
    from .loading import load

    planned |= {
        "settings": _stage_settings(strength, stage_steps, sharpen),
        "tile": Plan.tile if tile is None else tile,
    }
    placement: dict[str, Any] = {"device": device, "dtype": dtype, "offload": offload}
    placement["quantization"] = parse_quantization(quantize)
    weights = not plan
    if weights:
        recorded = {
            "size": size,
            "steps": steps,
            "guidance": guidance,
            "max_sequence_length": max_sequence_length,
            **extra_arguments,
        }
        recorded |= fresh
        weights = _check_files(texts, output, seed, share, recorded, overwrite=overwrite)
    source_options: dict[str, Any] = {"base": base, "revision": revision, "offline": offline, "impl": impl}
    pipe, about = load(source, **source_options, **placement, loras=loras, with_weights=weights)
    if stochastic:
        pipe.scheduler = with_fresh_noise(pipe.scheduler)
    if plan:
        _print_plan(pipe, planned)
        return
    began = time.perf_counter()
    drawing: dict[str, Any] = {
        "seed": seed,
        "guidance": guidance,
        "batch_size": batch_size,
        "arguments": extra_arguments,
    }
    files = generate_pictures(
        pipe, texts, output, **planned, **drawing, part=share, about=about | fresh, overwrite=overwrite
    )
    _print_files(files, output, time.perf_counter() - began)


def _stage_settings(strength: float | None, steps: int | None, sharpen: float | None) -> "Settings | None":
    """Settings of a cascade's later stages; None if none is given."""
    from ..pipelines.plan import Settings

    stages: dict[str, Any] = {"strength": strength, "steps": steps, "sharpen": sharpen}
    given = {name: value for name, value in stages.items() if value is not None}
    return Settings(**given) if given else None


def _check_files(
    texts: list[str], output: Path, seed: int, share: tuple[int, int], recorded: dict[str, Any], *, overwrite: bool
) -> bool:
    """Check the files before a large model is loaded; returns whether any has to be made."""
    from ..pipelines.files import check_existing_pictures, plan_files, settings_metadata

    planned = plan_files(texts, output, seed=seed, text=settings_metadata(recorded))[share[0] - 1 :: share[1]]
    if not overwrite:
        check_existing_pictures(planned)
    return overwrite or not all(one.path.exists() for one in planned)


def _print_plan(pipe: Any, planned: dict[str, Any]) -> None:
    from ..pipelines.generate import plan_cascade

    staged = plan_cascade(pipe, **planned)
    print("one call of the pipeline, no stages" if staged is None else staged.plan)


def _print_files(files: list[Path], output: Path, seconds: float) -> None:
    if not files:
        print("this part has no pictures")
        return
    where = str(files[0]) if len(files) == 1 else f"{len(files)} pictures in {output}"
    print(f"{where}; {seconds:.1f} s")
