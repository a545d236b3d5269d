"""`lineardit decode`: pictures from latents that `generate` has left."""

from pathlib import Path
from typing import Annotated

import typer

from .options import MACHINE, MODEL, Device, Dtype, Offline, Revision


def decode(
    latents: Annotated[Path, typer.Argument(metavar="LATENTS", help="X.latents.safetensors, as generate leaves it.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="PNG file; else X.png beside it.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the picture that is there.")] = False,
    base: Annotated[
        str | None,
        typer.Option(rich_help_panel=MODEL, help="The pipeline whose VAE decodes; else the one named inside."),
    ] = None,
    revision: Revision = None,
    offline: Offline = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    tile: Annotated[
        int, typer.Option(rich_help_panel=MACHINE, help="Side in pixels of the tiles that are decoded at a time.")
    ] = 1024,
) -> None:
    """Finish a picture whose decoding was interrupted. This loads the VAE alone."""
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
