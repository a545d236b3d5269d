"""Picture sizes that each family can make."""

import inspect
from typing import Any

import diffusers
import pytest
from model_cascades import pipeline_and_arguments

from lineardit import HighResolutionPipeline
from lineardit.examples.tiny_flux.model import build_pipeline
from lineardit.pipelines.sizes import default_size, native_side, size_multiple
from tiny_models import build


def vae() -> Any:
    """Halves the sides twice: 4 pixels per latent."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
    )


def pipeline(family: str) -> Any:
    """Without text encoders."""
    model, scheduler = build(family), diffusers.FlowMatchEulerDiscreteScheduler()
    if family == "flux":
        return diffusers.FluxPipeline(scheduler, vae(), None, None, None, None, model)
    if family == "sd3":
        return diffusers.StableDiffusion3Pipeline(model, scheduler, vae(), None, None, None, None, None, None)
    if family == "pixart":
        return diffusers.PixArtSigmaPipeline(None, None, vae(), model, diffusers.DPMSolverMultistepScheduler())
    return diffusers.StableDiffusionPipeline(
        vae(),
        None,
        None,
        model,
        diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        None,
        None,
        requires_safety_checker=False,
    )


@pytest.mark.parametrize(("family", "multiple"), [("flux", 8), ("sd3", 8), ("pixart", 8), ("unet", 4)])
def test_size_multiple_counts_latents_and_patches(family: str, multiple: int) -> None:
    assert size_multiple(pipeline(family)) == multiple


@pytest.mark.parametrize(("family", "side"), [("flux", 512), ("sd3", 64), ("pixart", 64), ("unet", 64)])
def test_default_size_is_the_pipelines_own(family: str, side: int) -> None:
    assert default_size(pipeline(family)) == (side, side)


def test_native_side_is_the_same_for_a_picture_and_a_cascade() -> None:
    pipe = build_pipeline(0)  # FluxPipeline's own number is 128 latents, of 2 pixels each here
    assert native_side(pipe) == HighResolutionPipeline.from_pipe(pipe).native_size == 128
    assert default_size(pipe) == (128, 128)


def test_native_side_ignores_the_size_of_the_vaes_training_crops() -> None:
    pipe, _ = pipeline_and_arguments("hunyuan-image")
    pipe.vae.register_to_config(sample_size=24)  # HunyuanImage-2.1 has 384 there, but generates 2048
    expected = pipe.default_sample_size * pipe.vae_scale_factor
    assert HighResolutionPipeline.from_pipe(pipe).native_size == default_size(pipe)[0] == expected


@pytest.mark.parametrize("family", ["flux", "sd3", "pixart", "unet"])
def test_native_side_of_stock_pipelines_is_their_default(family: str) -> None:
    pipe = pipeline(family)
    assert HighResolutionPipeline.from_pipe(pipe).native_size == native_side(pipe) == default_size(pipe)[0]


def test_default_size_reads_call_defaults_and_sizes_in_pixels() -> None:
    pipe = pipeline("flux")
    pipe.default_sample_size = 512  # in pixels, as in PRX
    assert default_size(pipe) == (512, 512)

    class WithDefaultSize(type(pipe)):
        def __call__(self, prompt: str, height: int = 768, width: int = 1360) -> None: ...

    pipe.__class__ = WithDefaultSize
    assert default_size(pipe) == (768, 1360)


class SizeChosen(Exception):
    """Holds the (height, width) that a pipeline's call has chosen."""


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("z-image", "prepare_latents"),
        ("z-image-omni", "prepare_latents"),
        ("qwen-image-21", "check_inputs"),
        ("joy-image", "prepare_latents"),
        ("joy-image-plus", "prepare_latents"),
    ],
)
def test_default_size_is_the_size_set_inside_the_call(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, arguments = pipeline_and_arguments(name)
    signature = inspect.signature(getattr(pipe, method))

    def raise_size(*given: Any, **named: Any) -> None:
        bound = signature.bind(*given, **named).arguments
        raise SizeChosen(bound["height"], bound["width"])

    monkeypatch.setattr(pipe, method, raise_size)
    with pytest.raises(SizeChosen) as raised:
        pipe(**{key: value for key, value in arguments.items() if not key.startswith("image")})
    assert raised.value.args == default_size(pipe)
