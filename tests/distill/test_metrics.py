"""PSNR, SSIM, latent MSE and the bootstrap against values worked out by hand."""

import math

import numpy
import pytest
import torch
from PIL import Image

from lineardit.distill.metrics import latent_mse, paired_bootstrap, psnr, ssim


def plain(value: int, size: tuple[int, int] = (16, 13)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def noisy(seed: int, size: tuple[int, int] = (15, 12)) -> Image.Image:
    pixels = numpy.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


def test_latent_mse_weights_pictures_equally() -> None:
    latents = [torch.full((4, 2), 3.0), torch.zeros(100, 2)]
    reference = [torch.full((4, 2), 1.0), torch.full((100, 2), 1.0)]
    assert latent_mse(latents, reference) == (4 + 1) / 2


def test_latent_mse_is_in_float32() -> None:
    latents, reference = [torch.full((8, 2), 1.0, dtype=torch.bfloat16)], [torch.full((8, 2), 1.0 + 2**-6)]
    assert latent_mse(latents, reference) == pytest.approx(2**-12, rel=1e-6)


def test_psnr_of_plain_pictures() -> None:
    assert psnr(plain(100), plain(101)) == pytest.approx(20 * math.log10(255))
    assert psnr(plain(100), plain(100)) == math.inf


def test_ssim_of_plain_pictures() -> None:
    x, y = 50 / 255, 200 / 255
    assert ssim(plain(50), plain(200)) == pytest.approx((2 * x * y + 1e-4) / (x * x + y * y + 1e-4), rel=1e-9)
    assert ssim(noisy(0), noisy(0)) == pytest.approx(1, abs=1e-12)


def test_ssim_equals_its_definition_window_by_window() -> None:
    x, y = (numpy.asarray(noisy(seed), numpy.float64) / 255 for seed in (1, 2))
    offsets = numpy.arange(11) - 5
    weight = numpy.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weight /= weight.sum()
    values = []
    for row in range(12 - 10):
        for column in range(15 - 10):
            for channel in range(3):
                a, b = (one[row : row + 11, column : column + 11, channel] for one in (x, y))
                mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
                variance_a, variance_b = (weight * (a - mean_a) ** 2).sum(), (weight * (b - mean_b) ** 2).sum()
                covariance = (weight * (a - mean_a) * (b - mean_b)).sum()
                likeness = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
                values.append(likeness / ((mean_a**2 + mean_b**2 + 1e-4) * (variance_a + variance_b + 9e-4)))
    assert ssim(noisy(1), noisy(2)) == pytest.approx(numpy.mean(values), rel=1e-9)


def test_ssim_refuses_pictures_below_its_window() -> None:
    with pytest.raises(ValueError, match="at least 11 pixels, got 10x20"):
        ssim(plain(1, (10, 20)), plain(1, (10, 20)))


def test_paired_bootstrap_of_equal_sides_is_zero() -> None:
    counts = [(1, 2), (2, 2), (0, 1)]
    interval = paired_bootstrap(counts, counts)
    assert (interval.difference, interval.low, interval.high) == (0, 0, 0)


def test_paired_bootstrap_of_many_pairs_is_the_normal_interval() -> None:
    random = numpy.random.default_rng(0)
    scores, reference = ([(int(hit), 1) for hit in random.random(400) < share] for share in (0.8, 0.9))
    interval = paired_bootstrap(scores, reference)
    each = numpy.array([a[0] - b[0] for a, b in zip(scores, reference, strict=True)])
    half = 1.96 * each.std() / math.sqrt(400)
    assert interval.difference == pytest.approx(each.mean())
    assert interval.low == pytest.approx(each.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(each.mean() + half, abs=0.1 * half)


def test_paired_bootstrap_keeps_pairs_together() -> None:
    """The reference is always one better on the same picture: unpaired resampling would give a wide interval."""
    scores, reference = [(0, 2), (1, 2)] * 20, [(1, 2), (2, 2)] * 20
    interval = paired_bootstrap(scores, reference)
    assert (interval.low, interval.high) == pytest.approx((-0.5, -0.5))


def test_paired_bootstrap_weights_objects_not_pictures() -> None:
    assert paired_bootstrap([(2, 2), (0, 1)], [(0, 2), (0, 1)]).difference == pytest.approx(2 / 3)


def test_paired_bootstrap_refuses_unequal_sides() -> None:
    with pytest.raises(ValueError, match="of one length, at least 1, got 1 and 2"):
        paired_bootstrap([(1, 1)], [(1, 1), (1, 1)])
