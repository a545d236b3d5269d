"""Pictures to enlarge: conversion of every accepted form to RGB, and enlarging."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from lineardit.pipelines.pictures import as_pictures, as_rgb, enlarged


def test_as_rgb_applies_the_exif_orientation(tmp_path: Path) -> None:
    photo, exif = Image.new("RGB", (4, 2), "blue"), Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    photo.save(tmp_path / "photo.jpg", exif=exif)
    with Image.open(tmp_path / "photo.jpg") as opened:
        assert as_rgb(opened).size == (2, 4)


def test_as_rgb_keeps_values_and_puts_transparency_on_white() -> None:
    values = numpy.array([[0, 257, 25_700, 65_535]], dtype=numpy.uint16)
    assert numpy.asarray(as_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 1, 100, 255]
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 255))
    assert numpy.asarray(as_rgb(clear)).tolist() == [[[255, 255, 255], [255, 0, 0]]]
    assert as_rgb(Image.new("L", (3, 2), 7)).getpixel((0, 0)) == (7, 7, 7)


def edge(width: int = 32) -> Image.Image:
    """Dark on the left, bright on the right, with one pixel between."""
    values = numpy.full((8, width, 3), 60, numpy.uint8)
    values[:, width // 2] = 130
    values[:, width // 2 + 1 :] = 200
    return Image.fromarray(values)


def test_enlarged_edges_are_sharp_and_have_no_halo() -> None:
    soft, sharp = (numpy.asarray(enlarged(edge(), 64, 16, amount), int)[8, :, 0] for amount in (0.0, 1.0))
    assert soft.min() < 60 and soft.max() > 200  # Lanczos has a halo
    assert sharp.min() == 60 and sharp.max() == 200
    assert numpy.diff(sharp).max() > 1.3 * numpy.diff(soft).max()


def test_enlarged_leaves_smooth_pictures_alone() -> None:
    gradient = Image.linear_gradient("L").convert("RGB")
    soft, sharp = (numpy.asarray(enlarged(gradient, 512, 400, amount), int) for amount in (0.0, 1.0))
    assert abs(sharp - soft)[8:-8].max() <= 1


@pytest.mark.parametrize("size", [(32, 8), (16, 6), (64, 4)])
def test_enlarged_sharpens_only_what_grows(size: tuple[int, int]) -> None:
    assert enlarged(edge(), *size, 1.0).tobytes() == edge().resize(size, Image.Resampling.LANCZOS).tobytes()


def test_as_pictures_gives_the_same_for_every_form() -> None:
    images = numpy.arange(2 * 4 * 6 * 3, dtype=numpy.uint8).reshape(2, 4, 6, 3)
    values = images / numpy.float32(255)
    tensor = torch.from_numpy(values).movedim(-1, 1)
    forms: list[Any] = [values, tensor, [*values], [*tensor], [Image.fromarray(one) for one in images], tensor.double()]
    for form in forms:
        assert numpy.array_equal(numpy.stack(as_pictures(form)), images)
    assert numpy.array_equal(numpy.stack(as_pictures(tensor[0])), images[:1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a.png", "must be PIL pictures, tensors .* got str"),
        ([], "at least one picture"),
        (torch.zeros(2, 1, 4, 4), r"got Tensor \[2, 1, 4, 4\]"),
        (torch.full((3, 4, 4), -1.0), r"values of image \[3, 4, 4\] must be in \[0, 1\], got -1 to -1"),
        (torch.full((3, 4, 4), torch.nan), "got nan to nan"),
        (torch.zeros(3, 0, 4), "got none"),
    ],
)
def test_as_pictures_refuses_other_values(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_pictures(given)
