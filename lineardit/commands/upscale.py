"""`lineardit upscale`: enlarge a picture, with details added by the model."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .loras import parse_loras
from .options import (
    MACHINE,
    Arguments,
    Base,
    ChunkTokens,
    Device,
    Dtype,
    Impl,
    Loras,
    MaxSequenceLength,
    Offline,
    Offload,
    Quantize,
    Revision,
    finite,
)
from .prompts import parse_arguments, parse_quantization, parse_size

# Further arguments of the call that a picture records, and that an enlarged one needs to show the same.
_REUSED_ARGUMENTS = ("negative_prompt", "negative_prompt_2", "negative_prompt_3", "true_cfg_scale")


def upscale(
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="The picture to enlarge.")],
    source: Annotated[
        str | None,
        typer.Argument(metavar="ADAPTER_OR_BASE", help="Hub id or folder; default: the one that made the picture."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file.")] = Path("upscaled.png"),
    size: Annotated[
        str | None,
        typer.Option(metavar="WIDTHxHEIGHT", help="Size in pixels; default: twice the picture's.", show_default=False),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the picture shows; default: the prompt in the PNG.")] = None,
    strength: Annotated[float, typer.Option(help="Noise level in (0, 1]: how much the model may change.")] = 0.3,
    steps: Annotated[int, typer.Option(help="Denoising steps of each stage.")] = 8,
    sharpen: Annotated[float, typer.Option(help="Strength of sharpening of the enlarged picture; 0: none.")] = 1.0,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seed of the noise; another seed gives other details.")
    ] = 0,
    guidance: Annotated[
        float | None,
        typer.Option(callback=finite, help="guidance_scale; default: the PNG's or the pipeline's."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing picture.")] = False,
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
    quantize: Quantize = None,
    tile: Annotated[int, typer.Option(help="Side of the VAE's tiles in pixels.", rich_help_panel=MACHINE)] = 1024,
    chunk_tokens: ChunkTokens = None,
) -> None:
    """Enlarge a picture in stages. Adds detail, with attention of linear cost.

    Defaults are read from a PNG made by lineardit: prompt and model, and, if a model of the same base made it,
    guidance, negative prompt and number of text tokens.
    """
    extra_arguments, loras = parse_arguments(arguments), parse_loras(lora)
    from .quiet import quiet_libraries

    quiet_libraries()
    from ..pipelines.cascade import check_larger, enlarge
    from ..pipelines.files import check_existing_pictures, plan_files, png_metadata, settings_metadata
    from ..pipelines.plan import Settings
    from .loading import load, recorded_base

    image, recorded = _read(picture), png_metadata(picture)
    prompt, source = _prompt_and_model(picture, recorded, prompt, source)
    if output.suffix.lower() != ".png":
        raise ValueError(f"output must end in .png, got {output}")
    settings = Settings(strength=strength, steps=steps, sharpen=sharpen, chunk_tokens=chunk_tokens)
    height, width = parse_size(size) if size else (2 * image.height, 2 * image.width)
    # checks before a large model is loaded
    check_larger(image, (height, width))
    (planned,) = plan_files(
        [prompt], output, seed=seed, text={"size": f"{width}x{height}", **settings_metadata(extra_arguments)}
    )
    if not overwrite:
        check_existing_pictures([planned])
    if base is None and source == recorded.get("adapter"):
        base = recorded_base(source, recorded.get("model"), revision, offline)
    placement: dict[str, Any] = {"device": device, "dtype": dtype, "offload": offload}
    placement["quantization"] = parse_quantization(quantize)
    source_options: dict[str, Any] = {"base": base, "revision": revision, "offline": offline, "impl": impl}
    must_generate = overwrite or not output.exists()
    pipe, about = load(source, **source_options, **placement, loras=loras, with_weights=must_generate)
    if "lora" in recorded and not loras:
        print(f"the picture was made with --lora {recorded['lora']}: give it again to keep its style")
    drawing: dict[str, Any] = {
        "guidance": guidance,
        "max_sequence_length": max_sequence_length,
        "arguments": extra_arguments,
    }
    if recorded.get("model") == about["model"]:
        drawing = recorded_settings(picture, recorded, **drawing)
    began = time.perf_counter()
    planned = replace(planned, text={**planned.text, **about})
    enlarge(pipe, image, planned, (height, width), settings, tile=tile, overwrite=overwrite, **drawing)
    print(f"{output}; {time.perf_counter() - began:.1f} s")


def _read(picture: Path) -> Any:
    """The picture, read completely."""
    from PIL import Image

    from ..pipelines.pictures import as_rgb

    if not picture.is_file():
        raise ValueError(f"{picture}: no such picture")
    try:
        with Image.open(picture) as opened:
            return as_rgb(opened)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{picture} is not a picture that Pillow can read completely: {error}") from error


def _prompt_and_model(
    picture: Path, recorded: Mapping[str, str], prompt: str | None, source: str | None
) -> tuple[str, str]:
    """The prompt and the model, as given or else as recorded in the PNG."""
    prompt = prompt or recorded.get("prompt")
    source = source or recorded.get("adapter") or recorded.get("model")
    if prompt is None or source is None:
        missing = "--prompt" if source else "the model, after the picture"
        raise ValueError(f"{picture} does not record how it was made: give {missing}")
    return prompt, source


def recorded_settings(
    picture: Path,
    recorded: Mapping[str, str],
    *,
    guidance: float | None,
    max_sequence_length: int | None,
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """Settings of the call, as given or else as recorded in the PNG, which a model of the same base has made.

    Raises:
        ValueError: a recorded number is not a number.
    """
    reused: dict[str, Any] = {}
    try:
        if guidance is None and "guidance" in recorded:
            reused["guidance"] = guidance = float(recorded["guidance"])
        if max_sequence_length is None and "max_sequence_length" in recorded:
            reused["max_sequence_length"] = max_sequence_length = int(recorded["max_sequence_length"])
        for name in _REUSED_ARGUMENTS:
            if name in recorded and name not in arguments:
                reused[name] = float(recorded[name]) if name == "true_cfg_scale" else recorded[name]
    except ValueError as error:
        raise ValueError(
            f"{picture} does not record correctly how it was made ({error}): give --guidance, --max-sequence-length "
            "and, with --argument, true_cfg_scale"
        ) from error
    if reused:
        print(f"as recorded in the picture: {', '.join(f'{name}={value!r}' for name, value in reused.items())}")
    more = {name: value for name, value in reused.items() if name in _REUSED_ARGUMENTS}
    return {"guidance": guidance, "max_sequence_length": max_sequence_length, "arguments": {**more, **arguments}}
