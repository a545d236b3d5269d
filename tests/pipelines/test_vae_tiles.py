"""The VAE in tiles: results as in one piece, bounded memory, smaller tiles when it runs out."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import AutoencoderKL
from PIL import Image
from tolerance import assert_close
from torch import Tensor

from lineardit.examples.tiny_flux import path, scenes
from lineardit.pipelines.group_statistics import _fixed_statistics_class, whole_statistics
from lineardit.pipelines.vae import decode, encode, encode_faithfully, pixels_per_latent, tile_spans


@pytest.fixture(scope="module")
def vae() -> Any:
    return AutoencoderKL.from_pretrained(path(), subfolder="vae").eval()


def pixels_of(picture: Image.Image) -> Tensor:
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float()
    return data.view(1, picture.height, picture.width, 3).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture(scope="module")
def picture() -> Tensor:
    return pixels_of(scenes.draw(scenes.sample(5), (320, 256)))


def test_encode_and_decode_in_one_piece_equal_the_vaes_own(vae: Any, picture: Tensor) -> None:
    latents = encode(vae, picture, tile=None)
    mode = vae.encode(picture).latent_dist.mode()
    scaled = (mode - vae.config.shift_factor) * vae.config.scaling_factor
    assert torch.equal(latents, scaled)
    assert torch.allclose(decode(vae, latents, tile=None), vae.decode(mode, return_dict=False)[0], atol=1e-5)


def test_decode_in_tiles_has_no_seams(vae: Any, picture: Tensor) -> None:
    """The error against one piece is small, and at borders it jumps no more than inside."""
    latents = encode(vae, picture, tile=None)
    error = (decode(vae, latents, tile=128) - decode(vae, latents, tile=None))[0]
    assert error.abs().mean() < 0.02  # of a range of 2; the VAE's own error is 0.011
    for dim in (1, 2):
        length = error.shape[dim]
        jumps = error.diff(dim=dim).abs().mean([0, 3 - dim])
        borders = {2 * end for span in tile_spans(length // 2, 64, 1) for end in span if 0 < end < length // 2}
        inside = [place for place in range(8, length - 8) if all(abs(place - border) > 3 for border in borders)]
        assert borders and jumps[[border - 1 for border in borders]].max() < jumps[inside].quantile(0.99)


def test_encode_in_tiles_is_near_one_piece(vae: Any, picture: Tensor) -> None:
    untiled, tiled = encode(vae, picture, tile=None), encode(vae, picture, tile=128)
    assert tiled.shape == untiled.shape
    assert (tiled - untiled).abs().mean() < 0.05 * untiled.std()


@pytest.mark.parametrize("tile", [None, 128])
def test_enlarged_pictures_keep_their_colours(vae: Any, tile: int | None) -> None:
    """A VAE trained on sharp pictures shifts soft ones; `encode_faithfully` corrects for it."""
    small = scenes.draw(scenes.sample(5), (128, 128))
    enlarged = pixels_of(small.resize((256, 256), Image.Resampling.LANCZOS))
    errors = [
        (decode(vae, encoding(vae, enlarged, tile=tile), tile=tile) - enlarged).square().mean()
        for encoding in (encode, encode_faithfully)
    ]
    assert errors[1] < 0.7 * errors[0]


def test_tiles_use_the_statistics_of_the_whole_picture(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = pixels_of(scenes.draw(scenes.sample(3), (384, 384)))
    latents = encode(vae, pixels, tile=None)
    untiled = decode(vae, latents, tile=None)

    def errors() -> tuple[float, float]:
        tiled = encode(vae, pixels, tile=192), decode(vae, latents, tile=192)
        return float((tiled[0] - latents).abs().mean()), float((tiled[1] - untiled).abs().mean())

    with_statistics = errors()
    assert all(type(module) is not _fixed_statistics_class(torch.nn.GroupNorm) for module in vae.modules())
    monkeypatch.setattr("lineardit.pipelines.vae.whole_statistics", lambda *_: nullcontext())
    without_statistics = errors()
    assert with_statistics[0] < 0.2 * without_statistics[0] and with_statistics[1] < 0.2 * without_statistics[1]


def test_tiles_are_unaffected_by_the_vaes_own_tiling_and_slicing(vae: Any, picture: Tensor) -> None:
    pixels = torch.cat([picture, picture.flip(1) / 2])
    expected = encode(vae, pixels, tile=128)
    tiling_vae = copy.deepcopy(vae)
    tiling_vae.enable_tiling()
    tiling_vae.enable_slicing()
    tiling_vae.tile_sample_min_size, tiling_vae.tile_latent_min_size = 64, 32
    assert torch.allclose(encode(tiling_vae, pixels, tile=128), expected, atol=1e-5)
    latents = expected[..., :64, :80]
    assert torch.allclose(decode(tiling_vae, latents, tile=96), decode(vae, latents, tile=96), atol=1e-5)
    for tile in (None, 1024):  # in one piece
        assert torch.allclose(encode(tiling_vae, pixels, tile=tile), encode(vae, pixels, tile=tile), atol=1e-5)
        assert torch.allclose(decode(tiling_vae, latents, tile=tile), decode(vae, latents, tile=tile), atol=1e-5)
    assert tiling_vae.use_tiling and tiling_vae.use_slicing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_statistics_of_the_same_picture_change_nothing(vae: Any, picture: Tensor, dtype: torch.dtype) -> None:
    vae_copy = copy.deepcopy(vae).to(dtype)
    latents = encode(vae, picture[..., :96, :64], tile=None).to(dtype)
    with torch.no_grad():
        expected = vae_copy.decode(latents).sample
        with whole_statistics(vae_copy, lambda: vae_copy.decode(latents)):
            kept = vae_copy.decode(latents).sample
            with pytest.raises(ZeroDivisionError), whole_statistics(vae_copy, lambda: 1 / 0):
                raise AssertionError("unreachable")
        assert_close(kept, copy.deepcopy(vae).double().decode(latents.double()).sample, expected)
        assert torch.equal(vae_copy.decode(latents).sample, expected)


@pytest.mark.parametrize("sequential", [False, True])
def test_tiles_work_with_offloading(vae: Any, picture: Tensor, sequential: bool) -> None:
    offloaded = copy.deepcopy(vae)
    if sequential:
        cpu_offload(offloaded, execution_device=torch.device("cpu"))
    else:
        cpu_offload_with_hook(offloaded, execution_device=torch.device("cpu"))
    for _ in range(2):
        assert torch.allclose(encode(offloaded, picture, tile=128), encode(vae, picture, tile=128), atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (33, 64), (40, 91), (160, 34)])
def test_tiles_cover_every_size(vae: Any, size: tuple[int, int]) -> None:
    """A VAE that copies its latents returns them: weights add up to 1, and no tile is larger than requested."""
    seen: list[int] = []

    class Copy(torch.nn.Module):
        config = vae.config
        dtype = torch.float32

        def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
            seen.append(latents.shape[-2:].numel())
            return (latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3),)

    latents = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    plain = (latents / vae.config.scaling_factor + vae.config.shift_factor)[:, :3]
    out = decode(Copy(), latents, tile=64)
    assert torch.allclose(out, plain.repeat_interleave(2, 2).repeat_interleave(2, 3), atol=1e-5)
    assert max(seen) <= 32**2
    assert pixels_per_latent(vae) == 2


TOO_LARGE = {
    "out of memory": torch.OutOfMemoryError("decoder"),
    "a tensor is too large for CUDA's kernels": RuntimeError(
        "upsample_nearest_nhwc only supports output tensors with less than INT_MAX elements, but got ..."
    ),
}


@pytest.mark.parametrize("reason", TOO_LARGE)
def test_decode_continues_in_smaller_tiles_if_a_picture_is_too_large(
    reason: str, vae: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    latents = torch.randn(1, 4, 150, 260, generator=torch.Generator().manual_seed(0))
    expected = decode(vae, latents, tile=260)
    original, sizes = vae.decode, []

    def small_memory(part: Tensor, return_dict: bool) -> Any:
        sizes.append(part.shape[-2:].numel())
        if sizes[-1] > 160**2:
            raise TOO_LARGE[reason]
        return original(part, return_dict=return_dict)

    monkeypatch.setattr(vae, "decode", small_memory)
    assert torch.equal(decode(vae, latents, tile=640), expected)
    assert sizes[0] == 150 * 260 and max(sizes[1:]) == 130**2
    assert f"{reason}: the VAE continues in tiles of 260 pixels" in caplog.text
    monkeypatch.setattr(vae, "decode", lambda *_, **__: (_ for _ in ()).throw(TOO_LARGE[reason]))
    with pytest.raises(type(TOO_LARGE[reason])):
        decode(vae, latents, tile=None)
