"""`lineardit profile`: where a model's attention goes, and how much a window or method changes each layer."""

import time
from collections.abc import Iterable
from pathlib import Path
from shlex import quote
from statistics import mean
from string import ascii_lowercase
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .method_options import parse_method
from .options import Arguments, Device, Dtype, Guidance, MaxSequenceLength, Offline, Offload, Quantize, Revision, Seed
from .prompts import parse_arguments, parse_numbers, parse_quantization, parse_size, read_prompts
from .tables import conditions_suffix, print_titled, wide_console

if TYPE_CHECKING:
    from ..linearize.measures.attention_profile import Profile


def profile(
    base: Annotated[str, typer.Argument(metavar="BASE", help="An unconverted pipeline: Hub id or folder.")],
    prompts: Annotated[Path, typer.Option("--prompts", help="Text file with one prompt per line, one picture each.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for profile.json and profile.png.")] = Path(
        "profile"
    ),
    size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Size in pixels; default: the model's.")
    ] = None,
    radii: Annotated[str, typer.Option(metavar="R,R,...", help="Windows to measure, in tokens.")] = "4,8,16,32",
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method", metavar="METHOD:SETTING=VALUE,...", help="A method to try in every layer as well; repeatable."
        ),
    ] = None,
    queries: Annotated[int, typer.Option(help="Image tokens to sample in each call of a layer.")] = 64,
    steps: Annotated[int, typer.Option(help="Denoising steps; every one is measured.")] = 8,
    seed: Seed = 0,
    guidance: Guidance = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing profile.")] = False,
    max_sequence_length: MaxSequenceLength = None,
    arguments: Arguments = None,
    revision: Revision = None,
    offline: Offline = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Offload = "none",
    quantize: Quantize = None,
) -> None:
    """Measure where attention goes, by layer and head. Also what windows and methods change, for convert."""
    texts, extra_arguments = read_prompts(prompts), parse_arguments(arguments)
    height_width = None if size is None else parse_size(size)
    windows = parse_numbers("--radii", radii)
    method_entries = [parse_method(text) for text in methods or ()]
    from ..distill.figures import require_matplotlib

    require_matplotlib("profile.png")
    from ..linearize.folders import check_output_file
    from ..linearize.measures.profiling import profile_attention
    from ..linearize.methods import config_from_dict
    from ..plots import draw_profile
    from .devices import find_device, find_dtype
    from .loading import load_at_size
    from .quiet import quiet_libraries

    quiet_libraries()
    configs = [config_from_dict(entries) for entries in method_entries]
    figures, picture = output / "profile.json", output / "profile.png"
    for file in (figures, picture):
        check_output_file(file, overwrite=overwrite)
    target = find_device(device)
    open_arguments: dict[str, Any] = {"dtype": find_dtype(dtype, target), "revision": revision, "offline": offline}
    open_arguments |= {"quantization": (quantization := parse_quantization(quantize))}
    pipe, height_width = load_at_size(base, height_width, device=target, offload=offload, **open_arguments)
    began = time.perf_counter()
    found = profile_attention(
        pipe,
        texts,
        size=height_width,
        radii=windows,
        methods=configs,
        steps=steps,
        queries=queries,
        seed=seed,
        guidance=guidance,
        max_sequence_length=max_sequence_length,
        arguments=extra_arguments,
    )
    output.mkdir(parents=True, exist_ok=True)
    found.write(figures)
    draw_profile(found, picture)
    show(found, conditions_suffix(quantization, offload))
    print(f"Wrote {figures} and {picture.name}; {time.perf_counter() - began:.0f} s")
    print(
        f"Convert with: lineardit convert {quote(base)} --from-profile {quote(str(figures))} --budget radius:8 -o DIR"
    )


def show(profile: "Profile", conditions: str = "") -> None:
    """Print where attention goes and what each candidate changes, a row for each layer.

    `conditions` is from `conditions_suffix`.
    """
    from ..linearize.measures.budget import describe_choice

    console = wide_console()
    windows = [f"< {radius:g}" for radius in profile.radii]
    letters = ascii_lowercase[: len(profile.methods)]
    where, error = _table([*windows, "text", "distance"]), _table([*windows, *letters])
    for layer in profile.layers:
        masses = [f"{mean(column):.0%}" for column in zip(*layer.mass, strict=True)]
        where.add_row(layer.module, *masses, f"{mean(layer.text):.0%}", f"{mean(layer.distance):.1f}")
        error.add_row(layer.module, *(f"{one:.2g}" for one in layer.output_error))
    print_titled(console, f"Attention of image tokens, mean over heads{conditions}", where)
    print_titled(console, "|converted - original|^2 / |original|^2 of a layer's attention", error)
    for letter, method in zip(letters, profile.methods, strict=True):
        console.print(f"{letter}: {describe_choice(method)}")


def _table(headers: Iterable[str]) -> Table:
    """An empty table with a column for the module and one for each header."""
    table = Table("module", box=SIMPLE_HEAD)
    for header in headers:
        table.add_column(header, justify="right")
    return table
