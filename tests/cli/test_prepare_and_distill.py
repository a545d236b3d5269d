"""`lineardit prepare`, then `lineardit distill` on its samples, on the command line."""

import json
from pathlib import Path

import pytest
from tiny_distill import CONFIG, PROMPTS, build_tiny

from lineardit.cli import run
from lineardit.commands.prompts import parse_part
from lineardit.distill.data import TeacherSamples


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    build_tiny().save_pretrained(folder)
    return folder


def test_prepare_then_distill_gives_an_adapter(base: Path, tmp_path: Path) -> None:
    prompts, samples = tmp_path / "prompts.txt", tmp_path / "samples"
    prompts.write_text("\n".join(PROMPTS[:3]))
    small = ["--size", "32x24", "--size", "24x32", "--steps", "1", "--max-sequence-length", "8", "--seed", "5"]
    prepare = ["prepare", str(base), "--prompts", str(prompts), *small, "--offline", "-o", str(samples)]
    assert run(prepare) == 0
    shards = json.loads((samples / "index.json").read_text())["shards"]
    entries = [sample for shard in shards for sample in shard["samples"]]
    assert [sample["prompt"] for sample in entries] == PROMPTS[:3]
    assert [sample["seed"] for sample in entries] == [5, 6, 7]
    assert [(sample["height"], sample["width"]) for sample in entries] == [(24, 32), (32, 24), (24, 32)]
    assert run(prepare) == 0  # nothing left to do

    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(base=base, samples=samples, run=tmp_path / "run"))
    assert run(["distill", str(config), "--set", "run.steps=1"]) == 0
    manifest = json.loads((tmp_path / "run" / "adapter" / "lineardit.json").read_text())
    assert [trained["kind"] for trained in manifest["trained"]] == ["lora"]
    assert run(["inspect", str(tmp_path / "run" / "adapter"), "--offline"]) == 0


def test_prepare_keeps_calls_on_request(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, samples = tmp_path / "prompts.txt", tmp_path / "samples"
    prompts.write_text("\n".join(PROMPTS[:2]))
    small = ["--size", "16x16", "--steps", "2", "--max-sequence-length", "8", "--calls", "2"]
    assert run(["prepare", str(base), "--prompts", str(prompts), *small, "-o", str(samples)]) == 0
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(base=base, samples=samples, run=tmp_path / "run"))
    assert run(["distill", str(config)]) == 2
    assert "loss.flow must be 0 for " in capsys.readouterr().err
    assert run(["distill", str(config), "--set", "loss.flow=0.0"]) == 0
    assert (tmp_path / "run" / "adapter").is_dir()


def test_prepare_splits_samples_by_option_or_launcher(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, samples = tmp_path / "prompts.txt", tmp_path / "samples"
    prompts.write_text("\n".join(PROMPTS[:1] * 65))  # one more than a shard
    small = ["--size", "16x16", "--steps", "1", "--max-sequence-length", "8", "--batch-size", "65"]
    prepare = ["prepare", str(base), "--prompts", str(prompts), *small, "-o", str(samples)]
    assert run([*prepare, "--part", "2/2"]) == 0
    assert [path.name for path in samples.glob("shard*")] == ["shard-00001.safetensors"]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(prepare) == 0
    assert len(TeacherSamples(samples)) == 65


def test_parts_of_several_launchers_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    parts = []
    for machine, rank in ((1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(parse_part(f"{machine}/2"))
    assert sorted(parts) == [(part, 6) for part in range(1, 7)]
    assert {(part - 1) % 2 for part, _ in parts[:3]} == {0}  # so any launcher can make the other half


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "1/2/3", "-1/2"])
def test_prepare_refuses_an_invalid_part(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle")
    options = ["--prompts", str(tmp_path / "prompts.txt"), "-o", str(tmp_path / "samples"), f"--part={part}"]
    assert run(["prepare", "base", *options]) == 2
    assert f"--part must be I/N with I from 1 to N, such as 2/8, got '{part}'" in capsys.readouterr().err


def test_distill_refuses_an_unknown_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(base="base", samples="samples", run=tmp_path / "run"))
    assert run(["distill", str(config), "--set", "run.stepz=1"]) == 2
    assert "steps" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
