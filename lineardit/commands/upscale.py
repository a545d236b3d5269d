"""`lineardit upscale`: a picture, larger, with details that the model adds."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    MACHINE,
    Arguments,
    Base,
    ChunkTokens,
    Device,
    Dtype,
    Guidance,
    Impl,
    Loras,
    MaxSequenceLength,
    Offline,
    Offload,
    Revision,
    Seed,
)


def upscale(
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="The picture to enlarge.")],
    source: Annotated[
        str | None, typer.Argument(metavar="[ADAPTER_OR_BASE]", help="Hub id or folder; else what made the picture.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file.")] = Path("upscaled.png"),
    size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Pixels; else twice the picture's.", show_default=False)
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the picture shows; else what the PNG says.")] = None,
    strength: Annotated[float, typer.Option(help="Noise level the picture gets, in (0, 1]: how much is new.")] = 0.3,
    steps: Annotated[int, typer.Option(help="Denoising steps of each stage.")] = 8,
    sharpen: Annotated[float, typer.Option(help="How much sharper its enlarged edges are made; 0: none.")] = 1.0,
    seed: Seed = 0,
    guidance: Guidance = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the picture that is there.")] = False,
    max_sequence_length: MaxSequenceLength = None,
    arguments: Arguments = None,
    lora: Loras = None,
    base: Base = None,
    revision: Revision = None,
    impl: Impl = "auto",
    offline: Offline = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Offload = "none",
    tile: Annotated[int, typer.Option(help="Side in pixels of the VAE's tiles.", rich_help_panel=MACHINE)] = 1024,
    chunk_tokens: ChunkTokens = None,
) -> None:
    """Enlarge a picture in stages. Sharper, more detail, at the cost of linear attention."""
    from .quiet import quiet_libraries

    quiet_libraries()
    from PIL import Image

    from ..pipelines.cascade import check_larger, enlarge
    from ..pipelines.files import check_there, plan_files, text_of
    from ..pipelines.pictures import as_rgb
    from ..pipelines.plan import Settings
    from .loading import base_said, load
    from .loras import parse_loras
    from .prompts import parse_arguments, parse_size

    more, loras = parse_arguments(arguments), parse_loras(lora)
    if not picture.is_file():
        raise ValueError(f"{picture}: no such picture")
    said = text_of(picture)
    try:
        with Image.open(picture) as opened:
            image = as_rgb(opened)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{picture} is no picture that Pillow can read whole: {error}") from error
    prompt = prompt or said.get("prompt")
    source = source or said.get("adapter") or said.get("model")
    if prompt is None or source is None:
        missing = "--prompt" if source else "the model, after the picture"
        raise ValueError(f"{picture} does not say how it was made: give {missing}")
    if output.suffix.lower() != ".png":
        raise ValueError(f"output must end in .png, got {output}")
    settings = Settings(strength=strength, steps=steps, sharpen=sharpen, chunk_tokens=chunk_tokens)
    height, width = parse_size(size) if size else (2 * image.height, 2 * image.width)
    # what can be told before a large model is loaded
    check_larger(image, (height, width))
    (wanted,) = plan_files([prompt], output, seed=seed, text={"size": f"{width}x{height}"})
    if not overwrite:
        check_there([wanted])
    if base is None and source == said.get("adapter"):
        base = base_said(source, said.get("model"), revision, offline)
    pipe, about = load(source, base, revision, dtype, device, offload, impl, offline, loras)
    wanted = replace(wanted, text={**wanted.text, **about})
    if "lora" in said and not loras:
        print(f"the picture was made with --lora {said['lora']}: give it again to keep its style")
    began = time.perf_counter()
    enlarge(
        pipe,
        image,
        wanted,
        (height, width),
        settings,
        tile=tile,
        guidance=guidance,
        max_sequence_length=max_sequence_length,
        arguments=more,
        overwrite=overwrite,
    )
    print(f"{output}; {time.perf_counter() - began:.1f} s")
