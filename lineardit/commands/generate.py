"""`lineardit generate`: pictures from prompts, with an adapter or with a base as it is."""

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
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="One picture each.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file, or a folder for several.")] = Path(
        "out.png"
    ),
    size: Annotated[str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Pixels; else the model's own.")] = None,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompts", help="Text file, one prompt a line.")] = None,
    count: Annotated[
        int,
        typer.Option(
            min=1, max=10_000, help="Pictures of each prompt, into a folder: the prompts, then all again, and so on."
        ),
    ] = 1,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would be done, and make nothing; this reads no weights.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pictures that are there.")] = False,
    max_sequence_length: MaxSequenceLength = None,
    stochastic: Annotated[
        bool,
        typer.Option(
            "--stochastic",
            help="Fresh noise in each step, of the first stage in a cascade; models of flow matching.",
            rich_help_panel=DRAWING,
        ),
    ] = False,
    arguments: Arguments = None,
    lora: Loras = None,
    cascade: Annotated[
        bool | None,
        typer.Option(
            "--cascade/--direct",
            help="In stages from the native size; else where the size takes several.",
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
            help="Only every N-th picture, from the I-th on; the processes of a launcher share it.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
) -> None:
    """Make pictures. Each PNG says how it was made; noise of picture i comes from seed + i whatever the batch.

    On N GPUs: accelerate launch --multi_gpu --num_processes N -m lineardit generate ...; on several machines --part.
    """
    share, more, loras = parse_part(part), parse_arguments(arguments), parse_loras(lora)
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
    placing: dict[str, Any] = {"device": device, "dtype": dtype, "offload": offload}
    placing["quantization"] = parse_quantization(quantize)
    weights = not plan
    if weights:
        said = {"size": size, "steps": steps, "guidance": guidance, "max_sequence_length": max_sequence_length, **more}
        said |= fresh
        weights = _check_files(texts, output, seed, share, said, overwrite=overwrite)
    where: dict[str, Any] = {"base": base, "revision": revision, "offline": offline, "impl": impl}
    pipe, about = load(source, **where, **placing, loras=loras, with_weights=weights)
    if stochastic:
        pipe.scheduler = with_fresh_noise(pipe.scheduler)
    if plan:
        _print_plan(pipe, planned)
        return
    began = time.perf_counter()
    drawing: dict[str, Any] = {"seed": seed, "guidance": guidance, "batch_size": batch_size, "arguments": more}
    files = generate_pictures(
        pipe, texts, output, **planned, **drawing, part=share, about=about | fresh, overwrite=overwrite
    )
    _print_files(files, output, time.perf_counter() - began)


def _stage_settings(strength: float | None, steps: int | None, sharpen: float | None) -> "Settings | None":
    """Of a cascade's later stages; None where nothing is said."""
    from ..pipelines.plan import Settings

    stages: dict[str, Any] = {"strength": strength, "steps": steps, "sharpen": sharpen}
    given = {name: value for name, value in stages.items() if value is not None}
    return Settings(**given) if given else None


def _check_files(
    texts: list[str], output: Path, seed: int, share: tuple[int, int], said: dict[str, Any], *, overwrite: bool
) -> bool:
    """What can be told of the files before a large model is loaded, and whether one is to be made."""
    from ..pipelines.files import check_there, plan_files, said_of

    wanted = plan_files(texts, output, seed=seed, text=said_of(said))[share[0] - 1 :: share[1]]
    if not overwrite:
        check_there(wanted)
    return overwrite or not all(one.path.exists() for one in wanted)


def _print_plan(pipe: Any, planned: dict[str, Any]) -> None:
    from ..pipelines.generate import in_stages

    staged = in_stages(pipe, **planned)
    print("one call of the pipeline, no stages" if staged is None else staged.plan)


def _print_files(files: list[Path], output: Path, seconds: float) -> None:
    if not files:
        print("no picture is in this part")
        return
    where = str(files[0]) if len(files) == 1 else f"{len(files)} pictures in {output}"
    print(f"{where}; {seconds:.1f} s")
