"""The effect of `rope_factor` on the small model's predictions: `python benchmarks/rope_factors.py`, tens of minutes.

Held-out drawings get the noise with which a stage of the cascade starts, and the student of `make high-resolution`
predicts the velocity in one forward. Prints the mean squared error for each size and rule:

    one     factor 1, as trained
    ramp    NTK scaling for a ratio that rises from 1 at the largest known side, k, as min(r, (r / k)^2)
    known   NTK scaling for r / k
    native  NTK scaling for r, the longest side over the native one; the default beyond k

The noise of a drawing is the same for all rules. The last numbers of a row: mean difference to native, and its
standard error.

With --pictures N, the cascade draws the first N held-out captions at 512 pixels instead, from one picture of 256 pixels
each with every rule, and the pictures are scored.
"""

import argparse
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import torch
from high_resolution import open_student, sharpness
from torch import Tensor
from tqdm import tqdm

from lineardit import HighResolutionPipeline
from lineardit.commands.prompts import parse_size
from lineardit.commands.quiet import quiet_libraries
from lineardit.examples.tiny_flux import path, scenes
from lineardit.pipelines.latents import pack_latents
from lineardit.pipelines.plan import KNOWN_SCALE, STRENGTH
from lineardit.pipelines.planning import ntk_factor
from lineardit.pipelines.positions import exact_positions, rope_scaled
from lineardit.pipelines.stock import rope_dim
from lineardit.pipelines.vae import encode
from lineardit.scene_judge import judge_scene

NATIVE, SIDE = 128, 512  # pixels; the second is that of --pictures
TEXT_TOKENS = 64
SCORES = ("objects", "coherence")
SIZES = ("256x256", "288x288", "320x320", "320x192", "384x384", "512x512")


def factors(ratio: float, dim: int) -> dict[str, float]:
    """The factor of each rule, for a longest side `ratio` times the native one."""
    ratios = {
        "one": 1.0,
        "ramp": min(ratio, max(1.0, (ratio / KNOWN_SCALE) ** 2)),
        "known": ratio / KNOWN_SCALE,
        "native": ratio,
    }
    return {name: ntk_factor(rule_ratio, dim) for name, rule_ratio in ratios.items()}


def errors(pipe: Any, number: int, size: tuple[int, int]) -> dict[str, float]:
    """Errors for one held-out drawing of `size` = (height, width) pixels, by rule."""
    scene = scenes.sample(number, split="held_out")
    pixels = pipe.image_processor.preprocess(scenes.draw(scene, size[::-1]))
    clean = encode(pipe.vae, pixels, tile=None)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(number))
    embeds, pooled, text_ids = pipe.encode_prompt(scene.caption, None, max_sequence_length=TEXT_TOKENS)
    rows, columns = (side // 2 for side in clean.shape[-2:])
    call = {
        "hidden_states": pack_latents((1 - STRENGTH) * clean + STRENGTH * noise),
        "timestep": torch.tensor([STRENGTH]),
        "encoder_hidden_states": embeds,
        "pooled_projections": pooled,
        "img_ids": pipe._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32),
        "txt_ids": text_ids,
        "return_dict": False,
    }
    target = pack_latents(noise - clean)
    dim = rope_dim(pipe.transformer)
    assert dim is not None, "FLUX's positions are rotary"
    by_rule = factors(max(size) / NATIVE, dim)
    by_factor = {factor: _error(pipe, call, target, factor) for factor in set(by_rule.values())}
    return {name: by_factor[factor] for name, factor in by_rule.items()}


@torch.no_grad()
def _error(pipe: Any, call: dict[str, Any], target: Tensor, factor: float) -> float:
    with exact_positions(pipe), rope_scaled(pipe, factor):
        return float((pipe.transformer(**call)[0] - target).square().mean())


def scores_of_cascade(high: Any, number: int) -> dict[str, dict[str, Any]]:
    """Scores of one held-out caption's picture of `SIDE` pixels, by rule; `high` is a `HighResolutionPipeline`."""
    caption = scenes.sample(number, split="held_out").caption
    plan, dim = high.plan(SIDE, SIDE), rope_dim(high.transformer)
    assert dim is not None, "FLUX's positions are rotary"

    def draw(**call: Any) -> Any:
        generator = torch.Generator("cpu").manual_seed(number)
        return high(caption, max_sequence_length=TEXT_TOKENS, generator=generator, **call).images[0]

    before = draw(plan=high.plan(SIDE // 2, SIDE // 2))
    by_rule = factors(SIDE / NATIVE, dim)
    by_factor = {}
    for factor in set(by_rule.values()):
        stage = replace(plan.stages[-1], rope_factor=factor)
        picture = draw(image=before, plan=replace(plan, stages=(stage,)))
        by_factor[factor] = {**judge_scene(caption, picture), "gradient": sharpness(picture)}
    return {name: by_factor[factor] for name, factor in by_rule.items()}


def compare_pictures(pipe: Any, captions: int) -> None:
    """Print the scores of the cascade's pictures for each rule."""
    high = HighResolutionPipeline.from_pipe(pipe, native_size=NATIVE)
    for one in (pipe, high):
        one.set_progress_bar_config(disable=True)
    made = [scores_of_cascade(high, number) for number in tqdm(range(captions), unit="picture")]
    for name in made[0]:
        rows = [one[name] for one in made]
        objects, coherent = ([sum(pair) for pair in zip(*(row[key] for row in rows), strict=True)] for key in SCORES)
        gradients = [row["gradient"] for row in rows if row["gradient"] is not None]
        print(
            f"  {name:6}  objects {objects[0]} of {objects[1]}, coherent {coherent[0]} of {coherent[1]}, gradient at "
            f"objects {mean(gradients):.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--captions", type=int, default=4, help="held-out ones")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="WIDTHxHEIGHT")
    parser.add_argument("--pictures", type=int, default=0, help="score the cascade's pictures of this many captions")
    options = parser.parse_args()
    quiet_libraries()
    pipe = open_student(path(), None)
    if options.pictures:
        compare_pictures(pipe, options.pictures)
        return
    for size in map(parse_size, options.sizes):
        made = [errors(pipe, number, size) for number in tqdm(range(options.captions), unit="drawing")]
        print(f"{size[1]}x{size[0]}")
        for name in made[0]:
            differences = [one[name] - one["native"] for one in made]
            standard_error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
            print(
                f"  {name:6}  {mean(one[name] for one in made):.4f}  {mean(differences):+.4f} +- {standard_error:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
