"""Pictures to enlarge: what is taken is what is shown, in whatever form it comes."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from lineardit.pipelines.pictures import as_pictures, as_rgb


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


def test_every_form_gives_the_same_pictures() -> None:
    whole = numpy.arange(2 * 4 * 6 * 3, dtype=numpy.uint8).reshape(2, 4, 6, 3)
    levels = whole / numpy.float32(255)
    tensor = torch.from_numpy(levels).movedim(-1, 1)
    forms: list[Any] = [levels, tensor, [*levels], [*tensor], [Image.fromarray(one) for one in whole], tensor.double()]
    for form in forms:
        assert numpy.array_equal(numpy.stack(as_pictures(form)), whole)
    assert numpy.array_equal(numpy.stack(as_pictures(tensor[0])), whole[:1])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("a.png", "must be PIL pictures, tensors .* got str"),
        ([], "at least one picture"),
        (torch.zeros(2, 1, 4, 4), r"got Tensor \[2, 1, 4, 4\]"),
        (torch.full((3, 4, 4), -1.0), r"numbers of image \[3, 4, 4\] must lie in \[0, 1\], got -1 to -1"),
        (torch.full((3, 4, 4), torch.nan), "got nan to nan"),
        (torch.zeros(3, 0, 4), "got none"),
    ],
)
def test_what_is_no_picture_is_refused(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        as_pictures(given)
