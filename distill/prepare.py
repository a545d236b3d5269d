"""Generates training samples with the teacher, without a round trip through the VAE.

For FLUX.1 a sample is its final latents and conditions, to which training adds noise. For any other model it is some of
the denoiser's calls (`calls.py`), which require no knowledge of how the model was trained; with guidance they include
both branches.

Several processes can work on one set of samples, each on its part of the shards (`shards.py`).
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from ..kernels.pieces.results import dtype_name
from ..linearize import families
from ..linearize.calling import default_settings
from ..linearize.convert import swapped
from ..linearize.locks import folder_lock, remove_leftovers
from ..linearize.networks import denoiser
from ..linearize.weights.quantized import quantized_types
from ..pipelines.sizes import check_size, default_size
from .data import Sample, index_name
from .identity import architecture, fingerprint, main_dtype
from .latent_functions import has_latent_functions, latent_functions
from .samples import teacher_call_arguments
from .shards import write_shards

CALLS = 4  # kept per picture


def prepare(
    pipe: Any,
    prompts: Sequence[str],
    directory: str | Path,
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int = 4,
    max_sequence_length: int | None = None,
    calls: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    shard_size: int | None = None,
    part: tuple[int, int] = (1, 1),
) -> Path:
    """Generate one sample per prompt into a folder; called again, make the missing shards.

    The noise of sample i comes from `torch.Generator("cpu").manual_seed(seed + i)`. For final latents `batch_size`
    affects speed only; where calls are kept, pictures are made one at a time.

    Args:
        pipe: The original pipeline, on the device where it runs.
        prompts: One per sample; repeat a prompt to get it with several seeds.
        directory: A new folder, or that of an interrupted call with the same settings.
        sizes: (height, width) in pixels; sample i has sizes[i % len(sizes)]. None: the pipeline's default.
        steps: Denoising steps; None: the pipeline's default, or 28.
        guidance: `guidance_scale` of the pipeline; None: the pipeline's default.
        max_sequence_length: Text tokens; None: the pipeline's default.
        calls: Number of denoiser calls to keep per picture; 0: its final latents, for FLUX.1 only. None: 0 for FLUX.1,
            else 4.
        arguments: Further ones of the pipeline's call, such as {"negative_prompt": "blurry"}, where calls are kept.
        shard_size: Samples per file, held in memory until it is written; None: 64, or 8 where calls are kept.
        part: (i, n), counted from 1: make every n-th shard from the i-th on; other parts may run at the same time.
    Returns:
        The folder, which `TeacherSamples` reads.
    Raises:
        UnsupportedModelError: the model's class is not known.
        ValueError: a setting is out of range, unknown to the pipeline or different from the folder's, the pipeline is
            converted, another process is making this part, or the teacher's output is not finite.
    """
    settings = _settings(
        pipe,
        prompts,
        sizes=sizes,
        steps=steps,
        guidance=guidance,
        seed=seed,
        max_sequence_length=max_sequence_length,
        calls=calls,
        arguments=arguments,
        shard_size=shard_size,
    )
    _check(pipe, prompts, settings, batch_size, part)
    samples = _samples(pipe, prompts, settings)
    directory = Path(directory)
    with folder_lock(directory, name=f".{index_name(*part)}.lock"):
        remove_leftovers(directory, ("shard-*", "index*"), locks=".index*.lock")
        write_shards(pipe, samples, directory, settings, batch_size=batch_size, part=part)
    return directory


def _settings(
    pipe: Any,
    prompts: Sequence[str],
    *,
    sizes: Sequence[tuple[int, int]] | None,
    steps: int | None,
    guidance: float | None,
    seed: int,
    max_sequence_length: int | None,
    calls: int | None,
    arguments: Mapping[str, Any] | None,
    shard_size: int | None,
) -> dict[str, Any]:
    """The settings that determine the samples, as JSON values: stored with them, and compared by later calls."""
    _, model = denoiser(pipe)
    families.family_of(model)  # raises where the class is not known
    defaults = default_settings(pipe)
    if calls is None:
        calls = 0 if has_latent_functions(model) else CALLS
    try:
        arguments = json.loads(json.dumps(dict(arguments or {}))) or None
    except TypeError as error:
        raise ValueError(f"arguments must be JSON values, since they are saved with the samples: {error}") from error
    return {
        "teacher": fingerprint(model, torch.bfloat16),
        "model": type(model).__name__,
        "architecture": architecture(model),
        "dtype": dtype_name(main_dtype(model)),
        "quantized": quantized_types(model),
        "num_prompts": len(prompts),
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16],
        "sizes": [list(size) for size in (sizes if sizes is not None else [default_size(pipe)])],
        "steps": steps if steps is not None else defaults.steps or 28,
        "guidance": defaults.guidance if guidance is None else float(guidance),
        "seed": seed,
        "max_sequence_length": defaults.max_sequence_length if max_sequence_length is None else max_sequence_length,
        "calls": calls,
        "arguments": arguments,
        "shard_size": shard_size if shard_size is not None else 8 if calls else 64,
    }


def _check(
    pipe: Any, prompts: Sequence[str], settings: Mapping[str, Any], batch_size: int, part: tuple[int, int]
) -> None:
    model = denoiser(pipe)[1]
    if swapped(model):
        raise ValueError("pipe must be the original pipeline, got a converted one; call restore_ first")
    counts = {name: settings[name] for name in ("steps", "shard_size", "max_sequence_length")}
    for name, value in (counts | {"batch_size": batch_size}).items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if not prompts or not settings["sizes"]:
        raise ValueError(f"prompts and sizes must not be empty, got {len(prompts)} and {len(settings['sizes'])}")
    if settings["guidance"] is not None and not math.isfinite(settings["guidance"]):
        raise ValueError(f"guidance must be finite, got {settings['guidance']}")
    if not 1 <= part[0] <= part[1]:
        raise ValueError(f"part must be (i, n) with 1 <= i <= n, got {part}")
    _check_calls(model, settings["calls"], settings["arguments"])
    for size in settings["sizes"]:
        check_size(pipe, *size)
    if settings["calls"]:
        teacher_call_arguments(pipe, settings["sizes"][0], settings)  # raises for an unknown setting


def _check_calls(model: torch.nn.Module, calls: int, arguments: Mapping[str, Any] | None) -> None:
    if calls < 0:
        raise ValueError(f"calls must be >= 0, got {calls}")
    if arguments and not calls:
        raise ValueError(f"final latents are made without other arguments: record calls (--calls 4), got {arguments}")
    dtype = main_dtype(model)
    if calls and dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"calls must be made in float32 or bfloat16, the dtypes of training, got {dtype}: load the "
            "pipeline in another dtype (--dtype)"
        )


def _samples(pipe: Any, prompts: Sequence[str], settings: Mapping[str, Any]) -> list[Sample]:
    functions = None if settings["calls"] else latent_functions(denoiser(pipe)[1])
    samples = []
    for number, (prompt, (height, width)) in enumerate(zip(prompts, cycle(settings["sizes"]), strict=False)):
        grid = functions.grid(pipe, height, width) if functions else None
        seed = settings["seed"] + number
        samples.append(Sample(prompt=prompt, seed=seed, height=height, width=width, grid=grid))
    return samples
