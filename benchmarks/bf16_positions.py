"""What rounded positions do to a picture, on the small model: `python benchmarks/bf16_positions.py`, minutes.

A strip that repeats one scene sixteen times, 2048 x 128 pixels: 512 columns of tokens, whose positions bfloat16 rounds
from 256 on, as in diffusers' FLUX pipelines. It is noised, and denoised in bfloat16, with rounded and with exact
positions, and in float32; local attention of radius 16 keeps tokens to distances that the model knows. Writes
docs/images/bf16_positions.png, the middle of the strip, and prints errors against float32 in both halves.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

from lineardit import Clear, HighResolutionPipeline, linearize_
from lineardit.commands.quiet import quiet_libraries
from lineardit.distill.sheet import write_sheet
from lineardit.examples.tiny_flux import path, scenes
from lineardit.linearize.adapters.opening import open_pipeline
from lineardit.pipelines.plan import Plan, Stage

PICTURE = Path(__file__).parents[1] / "docs/images/bf16_positions.png"
COPIES, SIDE, TOKEN = 16, 128, 4  # pixels
MIDDLE = COPIES * SIDE // 2  # pixels; column 256 of the tokens
TEXT_TOKENS = 64


@contextmanager
def rounded_positions(pipe: Any) -> Iterator[None]:
    """A context in which the model gets rounded positions, as of diffusers' pipelines in bfloat16."""

    def round_positions(_module: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0].bfloat16().float(),)

    handle = pipe.transformer.pos_embed.register_forward_pre_hook(round_positions)
    try:
        yield
    finally:
        handle.remove()


def strip(scene: Any) -> Image.Image:
    picture, canvas = scenes.draw(scene, (SIDE, SIDE)), Image.new("RGB", (COPIES * SIDE, SIDE))
    for number in range(COPIES):
        canvas.paste(picture, (number * SIDE, 0))
    return canvas


def denoise_strip(pipe: Any, scene: Any, stage: Stage) -> tuple[Image.Image, Tensor]:
    """The strip denoised, and its latents after one step [C, rows, columns]."""
    plan = Plan(height=SIDE, width=COPIES * SIDE, stages=(stage,), tile=None)
    generator = torch.Generator("cpu").manual_seed(0)
    steps: list[Tensor] = []

    def keep(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(tensors["latents"].float())
        return {}

    picture = pipe(
        scene.caption,
        image=strip(scene),
        plan=plan,
        max_sequence_length=TEXT_TOKENS,
        generator=generator,
        callback_on_step_end=keep,
    ).images[0]
    return picture, steps[0][0].T.unflatten(1, (SIDE // TOKEN, -1))


def rms_by_half(error: Tensor) -> str:
    """Root mean square of [..., columns], left and right of the middle."""
    left, right = (half.square().mean().sqrt() for half in error.chunk(2, dim=-1))
    return f"{left:.4f} in columns below 256, {right:.4f} from there on"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scene", type=int, default=3, help="number of the held-out scene")
    parser.add_argument("--strength", type=float, default=0.6, help="noise level to start from")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    quiet_libraries()
    scene = scenes.sample(options.scene, split="held_out")
    stage = Stage(
        height=SIDE,
        width=COPIES * SIDE,
        steps=options.steps,
        strength=options.strength,
        shift=3.16,
        attention="converted",
    )
    pipe = open_pipeline(path())
    linearize_(pipe, Clear(radius=16))
    high = HighResolutionPipeline.from_pipe(pipe)
    high.set_progress_bar_config(disable=True)
    reference = denoise_strip(high, scene, stage)
    high.to(torch.bfloat16)
    high.vae.to(torch.float32)
    with rounded_positions(high):
        rounded = denoise_strip(high, scene, stage)
    exact = denoise_strip(high, scene, stage)
    for name, result in (("rounded positions", rounded), ("exact positions", exact)):
        pixels, reference_pixels = (pil_to_tensor(one[0]) for one in (result, reference))
        print(f"{name}, latents after one step: {rms_by_half(result[1] - reference[1])}")
        print(f"{name}, pixels of the picture, of 255: {rms_by_half(pixels - reference_pixels)}")
    shown = [result[0].crop((MIDDLE - 256, 0, MIDDLE + 256, SIDE)) for result in (rounded, exact)]
    write_sheet(["positions in bfloat16: rounded from the middle on", "exact positions"], [shown], PICTURE)


def pil_to_tensor(image: Image.Image) -> Tensor:
    """[height, width, 3] -> [3, height, width], float32."""
    return torch.from_numpy(numpy.array(image, numpy.float32)).permute(2, 0, 1)


if __name__ == "__main__":
    main()
