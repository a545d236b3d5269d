"""Pictures' files: nothing that waits to be decoded is lost, and what is enlarged is what is shown."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from tiny_distill import build_tiny

from lineardit.pipelines import files
from lineardit.pipelines.decoding import decode_file
from lineardit.pipelines.files import Wanted, as_rgb, not_there, write_latents

LATENTS = torch.zeros(1, 4, 16)  # tokens of a picture of 8 x 8


def wanted(path: Path, prompt: str) -> Wanted:
    return Wanted(path=path, prompt=prompt, seed=0, text={"prompt": prompt, "size": "8x8"})


def test_latents_of_another_picture_are_not_written_over(tmp_path: Path) -> None:
    one, other = (wanted(tmp_path / "out.png", prompt) for prompt in ("a circle", "a square"))
    write_latents(one.latents, LATENTS, {**one.text, "stages": "[]"})
    assert not_there([one], one.path) == [one]
    with pytest.raises(ValueError, match=r"out.latents.safetensors holds another picture, not decoded yet"):
        not_there([other], other.path)


def test_decode_takes_away_no_other_latents(tmp_path: Path) -> None:
    build_tiny().save_pretrained(tmp_path / "base")
    one, other = (tmp_path / f"{name}.latents.safetensors" for name in "ab")
    for file in (one, other):
        write_latents(file, LATENTS, {"model": str(tmp_path / "base"), "size": "8x8"})
    how: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    assert decode_file(one, tmp_path / "b.png", **how).is_file()
    assert one.exists() and other.exists()
    assert decode_file(one, **how) == tmp_path / "a.png"
    assert not one.exists() and other.exists()


def test_a_full_disk_is_an_error_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match=r"out.latents.safetensors cannot be written: No space left"):
        write_latents(tmp_path / "out.latents.safetensors", LATENTS, {})
    assert not list(tmp_path.iterdir())


def test_as_rgb_turns_a_photo_as_its_camera_says(tmp_path: Path) -> None:
    photo, exif = Image.new("RGB", (4, 2), "blue"), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    photo.save(tmp_path / "photo.jpg", exif=exif)
    with Image.open(tmp_path / "photo.jpg") as opened:
        assert as_rgb(opened).size == (2, 4)


def test_as_rgb_keeps_levels_and_shows_what_is_transparent_on_white() -> None:
    levels = numpy.array([[0, 257, 25_700, 65_535]], dtype=numpy.uint16)
    assert numpy.asarray(as_rgb(Image.fromarray(levels)))[0, :, 0].tolist() == [0, 1, 100, 255]
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 255))
    assert numpy.asarray(as_rgb(clear)).tolist() == [[[255, 255, 255], [255, 0, 0]]]
    assert as_rgb(Image.new("L", (3, 2), 7)).getpixel((0, 0)) == (7, 7, 7)
