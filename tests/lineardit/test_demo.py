"""The demonstration on a tiny random pipeline: its pieces, its files, and resuming."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lineardit import demo as demo_module
from lineardit.demo import DemoSettings, demo
from lineardit.demo_page import next_commands, table_rows, write_page

SETTINGS = DemoSettings(
    radius=2,
    proxies=4,
    samples=4,
    sample_steps=1,
    train_steps=2,
    focus_tokens=64,
    captions=2,
    side=32,
    steps=1,
    large_side=48,
    pairs=2,
)


def test_demo_makes_pictures_figures_and_a_page(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch_here: Any, launched: list[list[str]]
) -> None:
    monkeypatch.setattr(demo_module, "launch", launch_here)
    out = tmp_path / "demo"
    report = demo(out, base=base, settings=SETTINGS)
    assert [row.name for row in report.rows] == ["teacher", "converted", "distilled", "hybrid"]
    assert report.rows[0].comparison is None
    converted, distilled, hybrid = (row.comparison for row in report.rows[1:])
    assert converted is not None
    assert distilled is not None
    assert hybrid is not None
    assert 0 < converted.latent_mse != distilled.latent_mse != hybrid.latent_mse > 0
    assert len(report.speed.pairs) == 2
    assert report.cpu_seconds > 0
    with Image.open(out / "512x512.png") as image:
        assert image.size == (48, 48)
    page = write_page(report, SETTINGS)
    text = page.read_text()
    for file in ("teacher-converted-distilled.png", "run/loss.png", "512x512.png"):
        assert (out / file).is_file()
        assert f'src="{file}"' in text
    for command in next_commands(report):
        assert command.split(" ")[0] in text
    assert json.loads((out / "report.json").read_text())["ratio"] == report.speed.ratio
    assert len(table_rows(report)) == 5

    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} | {out / "speed.json": 0}
    again = demo(out, base=base, settings=SETTINGS)
    assert len(launched) == 1
    assert again.speed == report.speed
    redrawn = {path.name for path, stamp in stamps.items() if stamp and path.stat().st_mtime_ns != stamp}
    assert redrawn <= {"teacher-converted-distilled.png", "index.html"}


def test_demo_refuses_other_settings_and_a_missing_pipeline(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no pipeline in .*missing: the demonstration needs the pipeline in a clone"):
        demo(tmp_path / "demo", base=tmp_path / "missing")
    assert not (tmp_path / "demo").exists()
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        demo(tmp_path, base=base)


def test_ratio_is_the_median_of_pairs() -> None:
    speed = demo_module.Speed(pairs=((4.0, 1.0), (9.0, 3.0), (10.0, 1.0)), gflops=1.0, threads=1)
    assert speed.ratio == 4
