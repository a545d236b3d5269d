"""`lineardit convert`: give a pretrained model attention of linear cost and write that as an adapter folder."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Offline, Revision


def convert(
    ctx: typer.Context,
    base: Annotated[str, typer.Argument(metavar="BASE", help="A pipeline in diffusers' format: Hub id or folder.")],
    method: Annotated[str, typer.Option(help="The attention to put in.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The adapter folder to write.")],
    layers: Annotated[str | None, typer.Option(help="Only modules whose name matches this pattern.")] = None,
    revision: Revision = None,
    importer: Annotated[
        str | None, typer.Option("--import", metavar="KIND:FILE", help="Published weights, e.g. clear:FILE.")
    ] = None,
    offline: Offline = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
) -> None:
    """Convert a model to an adapter folder. Reads its configuration, not its weights."""
    from ..linearize.conversion import convert_base
    from ..linearize.methods import config_from_dict
    from .quiet import quiet_libraries

    quiet_libraries()
    convert_base(
        base,
        config_from_dict({"method": method, **ctx.obj}),
        output=output,
        layers=layers,
        revision=revision,
        offline=offline,
        overwrite=overwrite,
        importer=importer,
    )
    print(f"Wrote {output}; see what it does with: lineardit inspect {output}")
