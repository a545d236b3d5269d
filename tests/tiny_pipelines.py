"""A tiny FluxPipeline without text encoders, for tests of saving to and loading from folders."""

from pathlib import Path

import diffusers
from trained import trained_

from lineardit import Clear, linearize_
from tiny_models import build

NO_TEXT = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))


def flux_pipeline() -> diffusers.FluxPipeline:
    """Random weights, the same for the same global seed; a VAE that halves the sides, so 4 pixels for each token."""
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=1,
        norm_num_groups=4,
        shift_factor=0.0,
        scaling_factor=1.0,
        sample_size=16,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxPipeline(scheduler, vae, None, None, None, None, build("flux"))


def saved_flux_pipeline(folder: Path) -> Path:
    """The pipeline of `flux_pipeline` as a folder, with a model card."""
    flux_pipeline().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-license\n---\n# A tiny pipeline\n")
    return folder


def plain(folder: Path) -> diffusers.FluxPipeline:
    """The pipeline as diffusers loads it."""
    return diffusers.DiffusionPipeline.from_pretrained(folder, **NO_TEXT)


def student_of(base: Path, kind: str) -> diffusers.FluxPipeline:
    """The pipeline converted, with trained weights of this kind."""
    pipe = plain(base)
    linearize_(pipe, Clear(radius=2, pool_size=2))
    trained_(pipe, kind, alpha=5, targets=["to_q"])
    return pipe
