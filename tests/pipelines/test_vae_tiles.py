"""The VAE in tiles: as in one piece, in bounded memory, smaller where memory runs out."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from lineardit.examples.tiny_flux import path, scenes
from lineardit.pipelines.vae import decode, encode, pixels_per_latent, tile_spans


@pytest.fixture(scope="module")
def vae() -> Any:
    return AutoencoderKL.from_pretrained(path(), subfolder="vae").eval()


def pixels_of(picture: Image.Image) -> Tensor:
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float()
    return data.view(1, picture.height, picture.width, 3).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture(scope="module")
def picture() -> Tensor:
    return pixels_of(scenes.draw(scenes.sample(5), (320, 256)))


def test_encode_then_decode_in_one_piece_is_the_vaes_own(vae: Any, picture: Tensor) -> None:
    latents = encode(vae, picture, tile=None)
    own = vae.encode(picture).latent_dist.mode()
    scaled = (own - vae.config.shift_factor) * vae.config.scaling_factor
    assert torch.equal(latents, scaled)
    assert torch.allclose(decode(vae, latents, tile=None), vae.decode(own, return_dict=False)[0], atol=1e-5)


def test_decode_in_tiles_has_no_step_at_their_borders(vae: Any, picture: Tensor) -> None:
    """The error against one piece drifts, as group norms see tiles; at borders it jumps no more than inside."""
    latents = encode(vae, picture, tile=None)
    error = (decode(vae, latents, tile=128) - decode(vae, latents, tile=None))[0]
    assert error.abs().mean() < 0.04  # of 2; the VAE's own error is 0.014
    for dim in (1, 2):
        length = error.shape[dim]
        jumps = error.diff(dim=dim).abs().mean([0, 3 - dim])
        borders = {2 * end for span in tile_spans(length // 2, 64, 1) for end in span if 0 < end < length // 2}
        inside = [place for place in range(8, length - 8) if all(abs(place - border) > 3 for border in borders)]
        assert borders and jumps[[border - 1 for border in borders]].max() < jumps[inside].quantile(0.99)


def test_encode_in_tiles_is_near_one_piece(vae: Any, picture: Tensor) -> None:
    whole, tiled = encode(vae, picture, tile=None), encode(vae, picture, tile=128)
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() < 0.2 * whole.std()


@pytest.mark.parametrize("size", [(1, 1), (33, 64), (40, 91), (160, 34)])
def test_tiles_cover_every_size(vae: Any, size: tuple[int, int]) -> None:
    """A VAE that copies its latents gives them back: weights add up to 1, and no tile is larger than asked."""
    seen: list[tuple[int, ...]] = []

    class Copy:
        config = vae.config
        dtype = torch.float32

        def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
            seen.append(tuple(latents.shape[-2:]))
            return (latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3),)

    latents = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    plain = (latents / vae.config.scaling_factor + vae.config.shift_factor)[:, :3]
    out = decode(Copy(), latents, tile=64)
    assert torch.allclose(out, plain.repeat_interleave(2, 2).repeat_interleave(2, 3), atol=1e-5)
    assert max(max(one) for one in seen) <= 32
    assert pixels_per_latent(vae) == 2


def test_decode_goes_on_in_smaller_tiles_when_memory_runs_out(
    vae: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    latents = torch.randn(1, 4, 320, 330, generator=torch.Generator().manual_seed(0))
    wanted = decode(vae, latents, tile=320)
    own, sizes = vae.decode, []

    def small_memory(part: Tensor, return_dict: bool) -> Any:
        sizes.append(part.shape[-1])
        if part.shape[-1] > 160:
            raise torch.OutOfMemoryError("decoder")
        return own(part, return_dict=return_dict)

    monkeypatch.setattr(vae, "decode", small_memory)
    assert torch.equal(decode(vae, latents, tile=640), wanted)
    assert sizes[0] == 320 and set(sizes[1:]) == {160}
    assert "the VAE goes on in tiles of 320 pixels" in caplog.text
    monkeypatch.setattr(vae, "decode", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("decoder")))
    with pytest.raises(torch.OutOfMemoryError):
        decode(vae, latents, tile=None)
