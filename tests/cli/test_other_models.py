"""Models other than FLUX.1 from the command line, from their prompts to pictures of a distilled student."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny_distill import CONFIG, PROMPTS
from whole_pipelines import WHOLE

from lineardit.cli import run


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_is_distilled_judged_and_used(name: str, tmp_path: Path) -> None:
    make, size = WHOLE[name]
    base, samples, config = tmp_path / "base", tmp_path / "samples", tmp_path / "config.toml"
    make().save_pretrained(base)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:3]))
    drawing = ["--prompts", str(tmp_path / "prompts.txt"), "--size", size, "--steps", "3"]
    drawing += ["--argument", f"negative_prompt={PROMPTS[5]}"]
    assert run(["prepare", str(base), *drawing, "--calls", "2", "-o", str(samples)]) == 0
    config.write_text(CONFIG.format(base=base, samples=samples, run=tmp_path / "run"))
    changed = ["--set", "loss.flow=0.0", "--set", "validate.samples=1"]
    assert run(["distill", str(config), *changed]) == 0
    adapter = str(tmp_path / "run" / "adapter")
    judging = ["evaluate", str(base), adapter, *drawing, "--batch-size", "2", "--no-memory"]
    assert run([*judging, "-o", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["latent_mse"] > 0 and report["settings"]["steps"] == 3
    assert run(["generate", adapter, *drawing, "--batch-size", "2", "-o", str(tmp_path / "pictures")]) == 0
    width, height = map(int, size.split("x"))
    drawn = [Image.open(file) for file in sorted((tmp_path / "pictures").glob("*.png"))]
    assert [one.size for one in drawn] == [(width, height)] * 3
    assert {one.info["negative_prompt"] for one in drawn} == {PROMPTS[5]}
    made = sorted((tmp_path / "report" / "pictures").rglob("*.png"))
    assert any(Image.open(file).tobytes() == drawn[0].tobytes() for file in made)  # `evaluate` draws the same
