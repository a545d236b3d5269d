"""Image-to-image and inpainting made by `from_pipe` share the converted denoiser with the pipeline they come from."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from lineardit import Clear, dense, linearize_, restore_
from lineardit.linearize import swapped
from lineardit.linearize.networks import denoiser


@pytest.mark.parametrize("converted_first", [True, False])
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("flux", diffusers.FluxImg2ImgPipeline),
        ("flux", diffusers.FluxInpaintPipeline),
        ("sd3", diffusers.StableDiffusion3Img2ImgPipeline),  # inpainting needs 16 latent channels
        ("unet", diffusers.StableDiffusionImg2ImgPipeline),
        ("unet", diffusers.StableDiffusionInpaintPipeline),
    ],
    indirect=["family"],
)
def test_from_pipe_shares_the_conversion(
    pipe: Any, paint: Callable[..., Tensor], kind: Any, converted_first: bool
) -> None:
    inputs: dict[str, Any] = {"image": torch.rand(1, 3, 16, 24), "strength": 1.0}
    if "Inpaint" in kind.__name__:
        inputs["mask_image"] = (torch.rand(1, 1, 16, 24) > 0.5).float()
    base = paint(kind.from_pipe(pipe), **inputs)

    if converted_first:
        linearize_(pipe, Clear(radius=30))
        other = kind.from_pipe(pipe)
    else:
        other = kind.from_pipe(pipe)
        linearize_(other, Clear(radius=30))
    assert swapped(denoiser(pipe)[1]) == swapped(denoiser(other)[1]) != {}
    assert torch.equal(paint(other, **inputs), base)
    linearize_(pipe, Clear(radius=1.5))
    windowed = paint(other, **inputs)
    assert not torch.allclose(windowed, base, atol=1e-3)
    with dense(pipe):
        assert torch.equal(paint(other, **inputs), base)
    restore_(other)
    assert torch.equal(paint(other, **inputs), base)
