"""The benchmark of the cascade, on few and small pictures."""

from pathlib import Path

import numpy
from PIL import Image, ImageFilter

from benchmarks.high_resolution import Amount, HighResolution, report, sharpness
from lineardit import Clear
from lineardit.examples.tiny_flux import path, scenes
from lineardit.linearize.conversion import convert_base
from lineardit.pipelines.plan import Settings

AMOUNT = Amount(
    native=128, side=192, captions=2, largest=224, few_captions=1, steps=1, text_tokens=32, settings=Settings(steps=1)
)


def test_run_has_every_row_and_goes_on(tmp_path: Path) -> None:
    convert_base(path(), Clear(radius=4), output=tmp_path / "adapter")
    run = HighResolution(path(), tmp_path / "adapter", tmp_path / "run", AMOUNT)
    rows, beside = run.run()
    assert [(row.name, row.side, row.pictures) for row in rows] == [
        ("teacher", 128, 2),
        ("cascade, student", 192, 2),
        ("direct, student", 192, 2),
        ("Lanczos", 192, 2),
        ("oracle", 192, 2),
        ("direct, teacher", 192, 2),
        ("cascade, student", 224, 1),
        ("direct, student", 224, 1),
        ("Lanczos", 224, 1),
        ("oracle", 224, 1),
    ]
    assert next(row for row in rows if row.name == "oracle").objects == 1
    text = report(AMOUNT, rows, beside, run.plan(AMOUNT.side))
    assert text.count("**no**") + text.count("| yes |") == 7
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*.png") if "stages" not in str(file)}
    again = HighResolution(path(), tmp_path / "adapter", tmp_path / "run", AMOUNT)
    assert again.run()[0] == rows
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps


def test_sharpness_falls_with_blur() -> None:
    drawn = scenes.draw(scenes.sample(5), (256, 256))
    blurred = drawn.filter(ImageFilter.GaussianBlur(3))
    sharp, soft = sharpness(drawn), sharpness(blurred)
    assert sharp is not None and soft is not None and soft < 0.5 * sharp
    assert sharpness(Image.fromarray(numpy.full((16, 16, 3), 128, numpy.uint8))) is None
