"""Picture files: no undecoded latents are lost."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny_distill import build_tiny

from lineardit.pipelines import files
from lineardit.pipelines.decoding import decode_file
from lineardit.pipelines.files import PictureJob, missing_pictures, plan_files, write_latents, write_picture

LATENTS = torch.zeros(1, 4, 16)  # tokens of 8 x 8 pixels


def make_job(path: Path, prompt: str) -> PictureJob:
    return PictureJob(path=path, prompt=prompt, seed=0, text={"prompt": prompt, "size": "8x8"})


def test_latents_of_another_picture_are_not_overwritten(tmp_path: Path) -> None:
    one, other = (make_job(tmp_path / "out.png", prompt) for prompt in ("a circle", "a square"))
    write_latents(one.latents, LATENTS, {**one.text, "stages": "[]"})
    assert missing_pictures([one]) == [one]
    with pytest.raises(ValueError, match=r"out.latents.safetensors holds another picture, not decoded yet"):
        missing_pictures([other])


def test_picture_beyond_pillows_limit_is_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path / "out.png", "a circle")
    write_picture(job, Image.new("RGB", (8, 8)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    assert missing_pictures([job]) == []


def test_decode_file_removes_only_its_own_latents(tmp_path: Path) -> None:
    build_tiny().save_pretrained(tmp_path / "base")
    one, other = (tmp_path / f"{name}.latents.safetensors" for name in "ab")
    for file in (one, other):
        write_latents(file, LATENTS, {"model": str(tmp_path / "base"), "size": "8x8"})
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    assert decode_file(one, tmp_path / "b.png", **options).is_file()
    assert one.exists() and other.exists()
    stages = tmp_path / "a.stages"
    stages.mkdir()
    for number, prompt in enumerate(("", "of another picture")):
        metadata = {"model": str(tmp_path / "base"), "size": "8x8"} | ({"prompt": prompt} if prompt else {})
        write_latents(stages / f"{number}.latents.safetensors", LATENTS, metadata)
    assert decode_file(one, **options) == tmp_path / "a.png"
    with pytest.raises(ValueError, match=r"a\.png does: its latents were decoded and removed"):
        decode_file(one, **options)
    assert [file.name for file in stages.iterdir()] == ["1.latents.safetensors"]
    assert not one.exists() and other.exists()


@pytest.mark.parametrize(
    "latents",
    [
        torch.zeros(1, 5, 16),  # another number of tokens
        torch.zeros(2, 4, 16),  # two pictures
        torch.zeros(1, 4, 12),  # other channels
        torch.zeros(1, 5, 4, 4),
        torch.zeros(1, 4, 2, 2),  # of a smaller picture
        torch.full((1, 4, 16), torch.nan),
    ],
)
def test_decode_file_keeps_latents_that_do_not_fit(latents: torch.Tensor, tmp_path: Path) -> None:
    build_tiny().save_pretrained(tmp_path / "base")
    file = tmp_path / "a.latents.safetensors"
    save_file({"latents": latents}, file, metadata={"model": str(tmp_path / "base"), "size": "8x8"})
    with pytest.raises(ValueError, match=r"must hold finite latents of one 8x8 picture .* got \["):
        decode_file(file, device=torch.device("cpu"), dtype=torch.float32)
    assert file.exists() and not (tmp_path / "a.png").exists()


def test_decode_file_refuses_a_folder_and_a_base_without_a_vae(tmp_path: Path) -> None:
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    with pytest.raises(ValueError, match="is a folder: pass one file of latents"):
        decode_file(tmp_path, **options)
    file = tmp_path / "a.latents.safetensors"
    write_latents(file, LATENTS, {"model": str(tmp_path), "size": "8x8"})
    with pytest.raises(ValueError, match="is no pipeline with a VAE of diffusers"):
        decode_file(file, **options)


def test_full_disk_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match=r"out.latents.safetensors cannot be written: No space left"):
        write_latents(tmp_path / "out.latents.safetensors", LATENTS, {})
    assert not list(tmp_path.iterdir())


def test_more_pictures_do_not_rename_the_first(tmp_path: Path) -> None:
    first, jobs = (plan_files(["a"] * count, tmp_path, seed=0, text={}) for count in (2, 1002))
    assert [job.path for job in jobs[:2]] == [job.path for job in first]
    assert [job.path.name for job in jobs[998:]] == ["998.png", "999.png", "1000.png", "1001.png"]
