"""`lineardit decode`: decode latents saved by `generate`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import MACHINE, MODEL, Device, Dtype, Offline, Revision


def decode(
    latents: Annotated[Path, typer.Argument(metavar="LATENTS", help="X.latents.safetensors, saved by generate.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="PNG file; default: X.png next to the latents.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing picture.")] = False,
    base: Annotated[
        str | None,
        typer.Option(rich_help_panel=MODEL, help="Pipeline whose VAE decodes; default: the one named in the file."),
    ] = None,
    revision: Revision = None,
    offline: Offline = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    tile: Annotated[int, typer.Option(rich_help_panel=MACHINE, help="Side in pixels of the tiles to decode.")] = 1024,
) -> None:
    """Finish a picture whose decoding was interrupted. Loads only the VAE."""
    from ..pipelines.decoding import decode_file
    from .devices import find_device, find_dtype
    from .quiet import quiet_libraries

    quiet_libraries()
    target = find_device(device)
    path = decode_file(
        latents,
        output,
        base=base,
        tile=tile,
        device=target,
        dtype=find_dtype(dtype, target),
        revision=revision,
        offline=offline,
        overwrite=overwrite,
    )
    print(path)
