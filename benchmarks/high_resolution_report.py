"""The report of `high_resolution.py`: marks and rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from high_resolution_memory import MAX_GROWTH, Memory, growths, table

Mark = tuple[str, str, str, bool]  # what is measured, the target, the measurement, whether it was met


@dataclass(frozen=True, kw_only=True)
class Row:
    """Pictures of one kind over the first captions."""

    name: str
    side: int
    pictures: int
    objects: float
    coherence: float
    sharpness: float  # mean gradient per pixel at borders of objects, of 255


def quality_marks(side: int, rows: Sequence[Row], measurements: dict[str, Any]) -> list[Mark]:
    """Marks of the cascade at this size and of its last stage, as far as measured."""
    marks: list[Mark] = [
        (
            f"cascade at {side} px: {name}",
            "at most 2 points below the 128 px teacher",
            f"{100 * interval['difference']:+.1f} points (95%: {100 * interval['low']:+.1f} to "
            f"{100 * interval['high']:+.1f})",
            interval["difference"] >= -0.02,
        )
        for name, interval in measurements.get("differences", {}).items()
    ]
    marks += sharpness_marks(side, rows)
    if similarity := measurements.get("last stage"):
        what = f"last stage, student against dense teacher ({similarity['captions']} captions)"
        marks += [
            (f"{what}: PSNR", "at least 27.7 dB", f"{similarity['psnr']:.2f} dB", similarity["psnr"] >= 27.7),
            (f"{what}: SSIM", "at least 0.90", f"{similarity['ssim']:.3f}", similarity["ssim"] >= 0.9),
        ]
    return marks


def sharpness_marks(side: int, rows: Sequence[Row]) -> list[Mark]:
    """Marks of the cascade at this size, once it and its rivals are measured."""
    edges = {row.name: row.sharpness for row in rows if row.side == side}
    if not {"cascade, student", "Lanczos", "oracle"} <= edges.keys():
        return []
    cascade, lanczos, oracle = (edges[name] for name in ("cascade, student", "Lanczos", "oracle"))
    what, times = f"sharpness at {side} px", cascade / lanczos
    return [
        (f"{what} against the oracle", "at least 50%", f"{cascade / oracle:.0%}", cascade >= oracle / 2),
        (f"{what} against Lanczos", "at least 1.5 times", f"{times:.2f} times", times >= 1.5),
    ]


def cost_marks(largest: int, measurements: dict[str, Any]) -> list[Mark]:
    """Marks of a step's time at this size and of memory growth, as far as measured."""
    marks: list[Mark] = []
    if seconds := measurements.get("step seconds"):
        student, teacher = seconds["student"], seconds["teacher"]
        marks.append(
            (
                f"a step at {largest} px",
                "at least 8 times as fast as the dense teacher's",
                f"{teacher / student:.1f} times ({student:.1f} s, {teacher:.1f} s; {seconds['machine']})",
                teacher >= 8 * student,
            )
        )
    target = f"at most {MAX_GROWTH} times for 4 times the pixels"
    return marks + [
        (f"memory with local attention, {name}", target, f"{ratio:.2f} times", ratio <= MAX_GROWTH)
        for name, ratio in growths(_memory(measurements))
    ]


def report(side: int, largest: int, rows: Sequence[Row], measurements: dict[str, Any], description: str) -> str:
    """Marks and rows; `measurements`: those besides the rows; `description`: of student and cascade."""
    marks = [
        *quality_marks(side, rows, measurements),
        *sharpness_marks(largest, rows),
        *cost_marks(largest, measurements),
    ]
    lines = [
        "# High resolution, on the small model",
        "",
        f"```\n{description}\n```",
        "",
        "| mark | target | measured | met |",
    ]
    lines += ["| --- | --- | --- | --- |"]
    lines += [
        f"| {name} | {target} | {measured} | {'yes' if met else '**no**'} |" for name, target, measured, met in marks
    ]
    lines += ["", "| pictures | px | captions | objects | coherence | gradient at objects |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row.name} | {row.side} | {row.pictures} | {row.objects:.1%} | {row.coherence:.1%} | {row.sharpness:.1f} |"
        for row in rows
    ]
    memory = ["", table(_memory(measurements))] if "memory" in measurements else []
    return "\n".join([*lines, *memory, "", "![pictures](high_resolution.png)", ""])


def _memory(measurements: dict[str, Any]) -> list[Memory]:
    return [Memory(**one) for one in measurements.get("memory", ())]
