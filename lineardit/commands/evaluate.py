"""`lineardit evaluate`: compare a student with its teacher on the same prompts and noise."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .options import (
    MACHINE,
    MODEL,
    Arguments,
    BatchSize,
    Device,
    Dtype,
    Guidance,
    Impl,
    MaxSequenceLength,
    Offline,
    Offload,
    Quantize,
    Seed,
    Steps,
)
from .prompts import parse_arguments, parse_quantization, parse_size, read_prompts
from .tables import conditions_suffix, print_titled, wide_console

if TYPE_CHECKING:
    from ..distill.evaluate import Report


def evaluate(
    teacher: Annotated[
        str, typer.Argument(metavar="TEACHER", help="The original pipeline (or any other): Hub id or folder.")
    ],
    student: Annotated[
        str, typer.Argument(metavar="STUDENT", help="The adapter to judge (or any other): Hub id or folder.")
    ],
    prompts: Annotated[Path, typer.Option("--prompts", help="Text file with one prompt per line.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for report, sheet and pictures.")],
    size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Size in pixels; default: the teacher's.")
    ] = None,
    steps: Steps = None,
    seed: Seed = 0,
    guidance: Guidance = None,
    shown: Annotated[int, typer.Option(min=1, help="Pictures in the sheet.")] = 16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a report with other settings.")] = False,
    max_sequence_length: MaxSequenceLength = None,
    arguments: Arguments = None,
    base: Annotated[
        str | None, typer.Option(rich_help_panel=MODEL, help="Base of the student, in place of the one it names.")
    ] = None,
    impl: Impl = "auto",
    offline: Offline = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Offload = "none",
    quantize: Quantize = None,
    batch_size: BatchSize = 4,
    memory: Annotated[
        bool, typer.Option(rich_help_panel=MACHINE, help="Measure peak memory; on a CPU, in separate processes.")
    ] = True,
) -> None:
    """Compare the pictures of a student and its teacher. Also latents, seconds and memory; resumable."""
    from .quiet import quiet_libraries

    quiet_libraries()
    from ..distill.evaluate import ByName
    from ..distill.evaluate import evaluate as compare
    from ..distill.pictures import PictureSettings
    from ..kernels.pieces.results import dtype_name
    from ..scene_judge import judge_scene
    from .devices import find_device, find_dtype

    height, width = parse_size(size) if size else (None, None)
    texts = read_prompts(prompts)
    drawing: dict[str, Any] = {"steps": steps, "guidance": guidance, "seed": seed, "batch_size": batch_size}
    drawing |= {"arguments": parse_arguments(arguments)}
    settings = PictureSettings(height=height, width=width, max_sequence_length=max_sequence_length, **drawing)
    target = find_device(device)
    common: dict[str, Any] = {
        "dtype": dtype_name(find_dtype(dtype, target)),
        "device": str(target),
        "impl": impl,
        "offline": offline,
        "offload": offload,
        "quantization": parse_quantization(quantize),
    }
    models = ByName(name=teacher, **common), ByName(name=student, base=base, **common)
    report = compare(
        *models, texts, output, settings=settings, judge=judge_scene, memory=memory, shown=shown, overwrite=overwrite
    )
    show(report, conditions_suffix(common["quantization"], offload))
    print(f"Report and pictures: {output}")


def show(report: "Report", conditions: str = "") -> None:
    """Print the table; `conditions` is from `conditions_suffix`."""
    settings = report.settings
    pictures = f"{report.pictures} picture{'s' * (report.pictures != 1)}"
    steps = f"{settings.steps} step{'s' * (settings.steps != 1)}"
    title = f"{pictures} of {settings.width}x{settings.height}, {steps}{conditions}"
    table = Table("", "teacher", "student", box=SIMPLE_HEAD)
    for name, values in _rows(report):
        table.add_row(name, *values)
    print_titled(wide_console(), title, table)


def _rows(report: "Report") -> list[tuple[str, tuple[str, ...]]]:
    sides = report.teacher, report.student

    rows: list[tuple[str, tuple[str, ...]]] = [
        ("latent MSE to the teacher", ("0", f"{report.latent_mse:.4g}")),
        ("PSNR, dB", ("", f"{report.psnr:.2f}")),
        ("SSIM", ("", f"{report.ssim:.4f}")),
        ("seconds a picture", tuple(f"{side.seconds_per_picture:.3g}" for side in sides)),
        ("seconds a step", tuple(f"{side.seconds_per_step:.3g}" for side in sides)),
        ("peak memory, GiB", tuple(_gib(side.peak_gib) for side in sides)),
    ]
    for name, interval in report.differences.items():
        rows.append((f"{name}, %", tuple(_share(*side.scores[name]) for side in sides)))
        bounds = f"{100 * interval.difference:+.1f} ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"
        rows.append((f"{name}, difference in points (95%)", ("", bounds)))
    return rows


def _gib(peak: float | None) -> str:
    return "not measured" if peak is None else f"{peak:.2f}"


def _share(right: int, total: int) -> str:
    return f"{100 * right / total:.1f} ({right}/{total})"
