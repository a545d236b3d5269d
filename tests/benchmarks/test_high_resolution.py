"""The benchmark of the cascade, on a few small pictures."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image, ImageFilter

from lineardit import Clear
from lineardit.examples.tiny_flux import path, scenes
from lineardit.linearize.adapters.conversion import convert_base
from lineardit.pipelines.plan import Settings

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
AMOUNT: dict[str, Any] = {
    "native": 64,
    "side": 128,
    "captions": 2,
    "largest": 160,
    "few_captions": 1,
    "steps": 1,
    "text_tokens": 32,
    "settings": Settings(steps=1),
}


@pytest.fixture
def high_resolution(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("high_resolution")


def test_run_makes_every_row_and_resumes(high_resolution: Any, tmp_path: Path) -> None:
    amount = high_resolution.Amount(**AMOUNT)
    convert_base(path(), Clear(radius=4), output=tmp_path / "adapter")
    run = high_resolution.HighResolution(path(), tmp_path / "adapter", tmp_path / "run", amount)
    memory = [{"side": side, "idle": 1.0, "growth": side**2, "seconds": 1.0} for side in (1, 2, 6)]
    (tmp_path / "run" / "memory.json").write_text(json.dumps(memory))
    reports: list[str] = []
    run.run(lambda: reports.append(high_resolution.write_results(tmp_path / "results", run)))
    assert [(row.name, row.side, row.pictures) for row in run.rows] == [
        ("teacher", 64, 2),
        ("Lanczos", 128, 2),
        ("Lanczos, sharpened", 128, 2),
        ("oracle", 128, 2),
        ("cascade, student", 128, 2),
        ("Lanczos", 160, 1),
        ("Lanczos, sharpened", 160, 1),
        ("oracle", 160, 1),
        ("cascade, student", 160, 1),
        ("direct, student", 128, 1),
        ("direct, student", 160, 1),
        ("direct, teacher", 128, 1),
    ]
    assert next(row for row in run.rows if row.name == "oracle").objects == 1
    marks = [text.count("**no**") + text.count("| yes |") for text in reports]
    assert marks == [4, 6, 7, 9, 11, 11, 11, 11]  # the report grows row by row
    assert "4.00 times | yes |" in reports[-1] and "9.00 times | **no** |" in reports[-1]
    assert (tmp_path / "results" / "high_resolution.md").read_text() == reports[-1]
    assert {path.suffix for path in (tmp_path / "results").iterdir()} == {".json", ".md", ".png"}
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*.png") if "stages" not in str(file)}
    again = high_resolution.HighResolution(path(), tmp_path / "adapter", tmp_path / "run", amount)
    again.run(lambda: None)
    assert again.rows == run.rows
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps


@pytest.mark.slow
def test_memory_grows_with_the_pixels(high_resolution: Any) -> None:
    """In fresh processes; growth is over the memory of the loaded pipeline."""
    memory = importlib.import_module("high_resolution_memory")
    small, large = memory.measure_fresh([384, 768])
    assert small.peak > small.idle > 0 and small.growth > 50
    ((_, ratio),) = memory.growths([small, large])
    assert 1.5 < ratio <= memory.MAX_GROWTH


def test_sharpness_falls_with_blur(high_resolution: Any) -> None:
    drawn = scenes.draw(scenes.sample(5), (256, 256))
    blurred = drawn.filter(ImageFilter.GaussianBlur(3))
    sharp, soft = (high_resolution.sharpness(picture) for picture in (drawn, blurred))
    assert sharp is not None and soft is not None and soft < 0.5 * sharp
    assert high_resolution.sharpness(Image.fromarray(numpy.full((16, 16, 3), 128, numpy.uint8))) is None
