"""Similarity of two sets of pictures (latent MSE, PSNR, SSIM), and confidence intervals of score differences."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

SSIM_WINDOW = 11  # pixels
SSIM_SIGMA = 1.5  # pixels
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # for pixels from 0 to 1

RESAMPLES = 10_000  # of a bootstrap

Count = tuple[int, int]  # (right, total)


def latent_mse(latents: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Mean squared error of each picture's latents in float32, then the mean over pictures."""
    errors = [F.mse_loss(ours.float(), theirs.float()) for ours, theirs in zip(latents, reference, strict=True)]
    return float(torch.stack(errors).mean())


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio of two 8-bit RGB pictures, in dB; infinite if they are identical."""
    error = (_pixels(image) - _pixels(reference)).square().mean()
    return float(-10 * error.log10())


def ssim(image: Image.Image, reference: Image.Image) -> float:
    """Structural similarity (Wang et al. 2004) of two RGB pictures: the mean over channels and full windows.

    Raises:
        ValueError: a side is shorter than the window of 11 pixels.
    """
    if min(image.size) < SSIM_WINDOW:
        raise ValueError(f"both sides must have at least {SSIM_WINDOW} pixels, got {image.width}x{image.height}")
    x, y = _pixels(image), _pixels(reference)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    numerator = (2 * mean_x * mean_y + SSIM_C1) * (2 * covariance + SSIM_C2)
    denominator = (mean_x**2 + mean_y**2 + SSIM_C1) * (variance_x + variance_y + SSIM_C2)
    return float((numerator / denominator).mean())


def _pixels(image: Image.Image) -> Tensor:
    """[3, 1, H, W] in [0, 1], float64: the channels are the batch dimension."""
    pixels = numpy.asarray(image.convert("RGB"), numpy.float64) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)[:, None]


def _blur(planes: Tensor) -> Tensor:
    """Gaussian mean of every full window."""
    offset = torch.arange(SSIM_WINDOW, dtype=planes.dtype) - SSIM_WINDOW // 2
    weight = torch.exp(-(offset**2) / (2 * SSIM_SIGMA**2))
    weight = weight / weight.sum()
    return F.conv2d(F.conv2d(planes, weight.view(1, 1, -1, 1)), weight.view(1, 1, 1, -1))


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A difference of two shares, and its 95% confidence interval."""

    difference: float
    low: float
    high: float


def paired_bootstrap(ours: Sequence[Count], reference: Sequence[Count]) -> Interval:
    """The difference between our share of right answers and the reference's, over the same questions.

    Args:
        ours: (right, total) for each picture.
        reference: The same for the same captions and seeds.
    Raises:
        ValueError: there is no picture, or the lengths differ.
    """
    if not ours or len(ours) != len(reference):
        raise ValueError(f"ours and reference must be of one length, at least 1, got {len(ours)} and {len(reference)}")
    counts = numpy.array([ours, reference], numpy.float64)  # [2, pictures, (right, total)]
    number = len(ours)
    # sets of pictures drawn with replacement, each with the results of both sides
    resampled = numpy.random.default_rng(0).multinomial(number, [1 / number] * number, size=RESAMPLES)
    sums = resampled @ counts  # [2, RESAMPLES, (right, total)]
    shares = sums[..., 0] / sums[..., 1]
    low, high = numpy.quantile(shares[0] - shares[1], (0.025, 0.975))
    totals = counts.sum(axis=1)
    difference = totals[0, 0] / totals[0, 1] - totals[1, 0] / totals[1, 1]
    return Interval(difference=float(difference), low=float(low), high=float(high))
