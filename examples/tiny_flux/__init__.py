"""A real, trained text-to-image pipeline of FLUX's architecture, small enough for a CPU and for this repository."""

from pathlib import Path


def path() -> Path:
    """The folder of the trained pipeline, as `diffusers.FluxPipeline.from_pretrained` takes it."""
    return Path(__file__).with_name("pipeline")
