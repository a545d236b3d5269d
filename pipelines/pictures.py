"""Input pictures, to be enlarged or used as control images."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy
from PIL import Image, ImageChops, ImageFilter, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

logger = logging.getLogger(__name__)

MAX_STRETCH = 0.02  # log ratio of aspect ratios above which a warning is logged; rounding of sizes stays below


def as_pictures(given: Any) -> list[Image.Image]:
    """Pictures as diffusers takes them, in RGB.

    Args:
        given: PIL, an array [h, w, 3] or a tensor [3, h, w] in [0, 1]; a batch of these, [B, ...]; or a list of them.
    Raises:
        ValueError: something else, or numbers outside of [0, 1].
    """
    if not isinstance(given, list | tuple):
        return _pictures_of(given)
    if not given:
        raise ValueError("image must hold at least one picture, got an empty list")
    return [picture for one in given for picture in _pictures_of(one)]


def as_rgb(picture: Image.Image) -> Image.Image:
    """A picture as displayed: turned as its EXIF data say, transparent parts on white, 16 bits reduced to 8."""
    turned = ImageOps.exif_transpose(picture)
    if turned.mode.startswith("I"):  # values up to 65,535
        turned = turned.convert("I").point(lambda value: value / 257).convert("L")
    if not turned.has_transparency_data:
        return turned.convert("RGB")
    turned = turned.convert("RGBA")
    white = Image.new("RGBA", turned.size, "white")
    return Image.alpha_composite(white, turned).convert("RGB")


def warn_stretched(picture: tuple[int, int], size: tuple[int, int]) -> None:
    """Warn if a picture (height, width) and its new size have different aspect ratios."""
    if abs(math.log(size[0] * picture[1] / (size[1] * picture[0]))) > MAX_STRETCH:
        logger.warning(
            "the picture is stretched: the aspect ratio of %dx%d differs from its own, %dx%d",
            *size[::-1],
            *picture[::-1],
        )


def enlarged(picture: Image.Image, width: int, height: int, sharpen: float) -> Image.Image:
    """Resize an RGB picture with Lanczos and sharpen its edges, since the model would keep their blur:

        y = min(max(x + sharpen (x - G x), low), high)

    x is the enlarged picture, G a Gaussian whose standard deviation is one pixel of the original, low and high are the
    smallest and largest value of the 3 x 3 original pixels around; the limits prevent halos.
    """
    large = picture.resize((width, height), Image.Resampling.LANCZOS)
    ratio = math.sqrt(width * height / (picture.width * picture.height))
    if sharpen == 0 or ratio <= 1:
        return large
    sharp = large.filter(ImageFilter.UnsharpMask(radius=ratio, percent=round(100 * sharpen), threshold=0))
    low, high = (
        _local_extreme(picture, choose).resize(large.size, Image.Resampling.BILINEAR)
        for choose in (numpy.minimum, numpy.maximum)
    )
    return ImageChops.darker(ImageChops.lighter(sharp, low), high)


def _local_extreme(picture: Image.Image, choose: numpy.ufunc) -> Image.Image:
    """The least or largest of the 3 x 3 values around each pixel; Pillow's filters sort them, which is slow."""
    values = numpy.pad(numpy.asarray(picture), ((1, 1), (1, 1), (0, 0)), mode="edge")
    values = choose(choose(values[:-2], values[1:-1]), values[2:])
    return Image.fromarray(choose(choose(values[:, :-2], values[:, 1:-1]), values[:, 2:]))


def _pictures_of(one: Any) -> list[Image.Image]:
    match one:
        case Image.Image():
            return [as_rgb(one)]
        case Tensor(ndim=3 | 4) if one.shape[-3] == 3:
            return _from_values(one.detach().float().movedim(-3, -1).cpu().numpy(), one.shape)
        case numpy.ndarray(ndim=3 | 4) if one.shape[-1] == 3:
            return _from_values(one, one.shape)
    got = f"{type(one).__name__} {list(one.shape)}" if hasattr(one, "shape") else type(one).__name__
    raise ValueError(f"image must be PIL pictures, tensors [B, 3, h, w] or arrays [B, h, w, 3], got {got}")


def _from_values(values: numpy.ndarray, shape: Sequence[int]) -> list[Image.Image]:
    """Pictures from values in [0, 1], an array [h, w, 3] or [B, h, w, 3]."""
    if values.size == 0 or not (values.min() >= 0 and values.max() <= 1):  # both are false for NaN
        got = "none" if values.size == 0 else f"{values.min():g} to {values.max():g}"
        raise ValueError(f"values of image {list(shape)} must be in [0, 1], got {got}")
    pixels = (values * 255).round().astype(numpy.uint8)
    return [Image.fromarray(picture) for picture in pixels.reshape(-1, *pixels.shape[-3:])]


def resized(picture: Any, height: int, width: int) -> Any:
    """Resize a tensor [B, 3, h, w], or several; other pictures are left as they are, since pipelines resize these."""
    if isinstance(picture, list | tuple):
        return [resized(one, height, width) for one in picture]
    if not isinstance(picture, Tensor) or picture.shape[-2:] == (height, width):
        return picture
    return interpolate(picture, (height, width), mode="bicubic", antialias=True)
