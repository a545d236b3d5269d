"""The page of a demonstration: its pictures, its figures, and commands to try next."""

import html
import os
import shutil
import sys
from pathlib import Path
from shlex import quote

from .demo import HYBRID, LARGE, RUN, SHEET, DemoReport, DemoSettings
from .linearize.folders import write_atomically

PAGE = "index.html"
CURVE = f"{RUN}/loss.png"

TEMPLATE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>lineardit: demonstration</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .2em 1em .2em 0; text-align: left; border-bottom: 1px solid #ccc; }}
img {{ max-width: 100%; }}
pre {{ background: #f4f4f4; padding: .5em 1em; overflow-x: auto; }}
</style>
<h1>Attention of linear cost, near the original</h1>
<p>A small FLUX pipeline was converted to local attention (radius {radius:g} tokens), which was distilled on pictures
made by the pipeline itself; and to a hybrid, which adds one proxy for each of {proxies} parts of the picture and,
individually, {focus_tokens} tokens of the parts with the most weight. The hybrid was not trained.</p>
<h2>Same prompts, same noise</h2>
<p>Captions that no training picture shows. Teacher: the original. Converted: local attention, not trained. Distilled:
after {train_steps} steps of the training below. Hybrid: not trained. A window alone cannot see what must agree across
the picture: stripes, light and shadows.</p>
{table}
<p><img src="{sheet}" alt="A column of pictures for each model"></p>
<h2>The training</h2>
<p><img src="{curve}" alt="Loss over the steps"></p>
<h2>Larger</h2>
<p>The hybrid at 512x512 (128x128 tokens). A step with local attention takes {student:.2f} s, the teacher's
{teacher:.2f} s: {ratio:.1f} times as fast (median of {pairs} pairs of steps, in turn).</p>
<p><img src="{large}" alt="A picture of 512x512 pixels"></p>
<h2>What to type next</h2>
<pre>{commands}</pre>
<p>{took}</p>
</html>
"""


def write_page(report: DemoReport, settings: DemoSettings) -> Path:
    """Write the page next to the pictures that it shows."""
    teacher, student = (sorted(one)[len(one) // 2] for one in zip(*report.speed.pairs, strict=True))
    text = TEMPLATE.format(
        radius=settings.radius,
        proxies=settings.proxies,
        train_steps=settings.train_steps,
        focus_tokens=settings.focus_tokens,
        table=_html_table(report),
        sheet=SHEET,
        curve=CURVE,
        large=LARGE,
        teacher=teacher,
        student=student,
        ratio=report.speed.ratio,
        pairs=len(report.speed.pairs),
        commands=html.escape("\n".join(next_commands(report))),
        took=describe_timing(report),
    )
    page = report.directory / PAGE
    write_atomically(page, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return page


def table_rows(report: DemoReport) -> list[tuple[str, ...]]:
    """The header and a row for each model."""
    names = list(report.rows[0].scores)
    rows = [("", *(f"{name} right" for name in names), "latent MSE", "PSNR, dB", "s/picture")]
    for row in report.rows:
        scores = (f"{100 * right / total:.0f}% ({right}/{total})" for right, total in row.scores.values())
        compared = ("", "")
        if row.comparison:
            compared = f"{row.comparison.latent_mse:.3f}", f"{row.comparison.psnr:.1f}"
        rows.append((row.name, *scores, *compared, f"{row.seconds_per_picture:.2f}"))
    return rows


def next_commands(report: DemoReport) -> list[str]:
    """Three commands to try."""
    adapter = quote(str(report.directory / HYBRID))
    lineardit = _command()
    caption = "a green cross at the middle center on shaded sky"
    return [
        f"{lineardit} inspect {adapter}",
        f'{lineardit} generate {adapter} "{caption}" --size 256x192 --max-sequence-length 64 -o cross.png',
        f"{lineardit} convert black-forest-labs/FLUX.1-dev -o flux-hybrid",
    ]


def _command() -> str:
    """How to call `lineardit` from this shell: by its path if its environment is not activated."""
    if shutil.which("lineardit"):
        return "lineardit"
    script = Path(sys.executable).with_name("lineardit")
    return quote(os.path.relpath(script)) if script.exists() else "python -m lineardit"


def describe_timing(report: DemoReport) -> str:
    """How long it took, and the speed of this machine for comparison."""
    speed = report.speed
    return (
        f"Took {report.seconds / 60:.1f} minutes, {report.cpu_seconds / 60:.1f} CPU-minutes. This machine: "
        f"{speed.gflops:.0f} GFLOP/s in a float32 matrix product with {speed.threads} threads."
    )


def _html_table(report: DemoReport) -> str:
    header, *rows = table_rows(report)
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>\n<tr>{cells}</tr>\n" + "\n".join(lines) + "\n</table>"
