"""VAEs of models other than FLUX.1."""

import torch
from model_cascades import pipeline_and_arguments, qwen_vae

from lineardit.pipelines.latents import patches_of
from lineardit.pipelines.vae import decode, encode, latent_channels, pixels_per_latent
from tiny_stock.stock import vae


def test_decode_upcasts_a_vae_that_overflows_in_half_precision() -> None:
    half, full = vae(4, blocks=4), vae(4, blocks=4)
    for model in (half, full):
        model.register_to_config(scaling_factor=0.13025)
    full.load_state_dict(half.state_dict())
    half.half()
    kinds: list[torch.dtype] = []
    half.decoder.register_forward_pre_hook(lambda _module, given: kinds.append(given[0].dtype))
    latents = torch.randn(1, 4, 8, 8)
    decoded = decode(half, latents.half(), tile=None)
    assert kinds == [torch.float32] and half.dtype == torch.float16
    half.register_to_config(force_upcast=False)
    decode(half, latents.half(), tile=None)
    assert kinds[1] == torch.float16
    half.register_to_config(force_upcast=True, scaling_factor=0.18215)  # AutoencoderKL's defaults
    decode(half, latents.half(), tile=None)
    assert kinds[2] == torch.float16
    assert torch.allclose(decoded, decode(full, latents, tile=None), atol=0.02)


def test_latents_are_normalized_per_channel_if_the_config_says_so() -> None:
    plain = vae(4)
    normalized = vae(4)
    normalized.load_state_dict(plain.state_dict())
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.5, 1.0, 0.5, 2.0]
    normalized.register_to_config(latents_mean=mean, latents_std=std)
    pixels = torch.randn(1, 3, 16, 16).clamp(-1, 1)
    latents, unnormalized = encode(normalized, pixels, tile=None), encode(plain, pixels, tile=None)
    per_channel = (torch.tensor(values)[:, None, None] for values in (mean, std))
    factor = plain.config.scaling_factor
    shift, scale = per_channel
    assert torch.allclose(latents, (unnormalized / factor - shift) * factor / scale, atol=1e-6)
    assert torch.allclose(decode(normalized, latents, tile=None), decode(plain, unnormalized, tile=None), atol=1e-5)
    pipe, _ = pipeline_and_arguments("flux2-klein")
    flux2 = pipe.vae
    pixels = torch.randn(1, 3, 32, 64).clamp(-1, 1)
    latents = encode(flux2, pixels, tile=None)
    assert torch.allclose(patches_of(latents), pipe._encode_vae_image(pixels, None), atol=1e-5)
    again = decode(flux2, latents, tile=None)
    assert torch.allclose(again, flux2.decode(flux2.encode(pixels).latent_dist.mode()).sample, atol=1e-5)
    qwen = qwen_vae(4)
    assert (latent_channels(qwen), pixels_per_latent(qwen)) == (4, 2)
