"""The teacher makes its own training samples: final latents and what it was told, never decoded and encoded again."""

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..linearize.convert import denoiser, swapped
from ..linearize.folders import write_whole
from .data import FORMAT, INDEX, Sample, read_index, shard_is_whole, shard_name
from .families import family_of
from .files import write_json

logger = logging.getLogger(__name__)


def prepare(
    pipe: Any,
    prompts: Sequence[str],
    directory: str | Path,
    *,
    sizes: Sequence[tuple[int, int]] = ((1024, 1024),),
    steps: int = 28,
    guidance: float = 3.5,
    seed: int = 0,
    batch_size: int = 4,
    max_sequence_length: int = 512,
    shard_size: int = 64,
) -> Path:
    """Generate one sample per prompt into a folder; called again, go on after the last whole shard.

    The noise of sample i comes from `torch.Generator("cpu").manual_seed(seed + i)`: `batch_size` is about speed only.

    Args:
        pipe: The original pipeline, on the device where it shall run.
        prompts: One per sample; repeat a prompt to get it with several seeds.
        directory: New, or that of an interrupted call with the same settings.
        sizes: (height, width) in pixels; sample i has sizes[i % len(sizes)].
        steps: Denoising steps.
        guidance: `guidance_scale` of the pipeline.
        max_sequence_length: Text tokens.
        shard_size: Samples per file.
    Returns:
        The folder, which `TeacherSamples` reads.
    Raises:
        ValueError: a setting is out of range, differs from those of the folder, or the pipeline is converted.
    """
    _, model = denoiser(pipe)
    _check(model, prompts, sizes, {"steps": steps, "batch_size": batch_size, "shard_size": shard_size})
    samples = _samples(pipe, prompts, sizes, seed)
    settings = {
        "teacher": fingerprint(model),
        "model": type(model).__name__,
        "num_prompts": len(prompts),
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16],
        "sizes": [list(size) for size in sizes],
        "steps": steps,
        "guidance": float(guidance),
        "seed": seed,
        "max_sequence_length": max_sequence_length,
        "shard_size": shard_size,
    }
    directory = Path(directory)
    _write_shards(pipe, samples, directory, settings, _whole_shards(directory, settings), batch_size)
    return directory


def _check(
    model: torch.nn.Module, prompts: Sequence[str], sizes: Sequence[tuple[int, int]], counts: dict[str, int]
) -> None:
    if swapped(model):
        raise ValueError("pipe must be the original pipeline, got a converted one; call restore_ first")
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if not prompts or not sizes:
        raise ValueError(f"prompts and sizes must not be empty, got {len(prompts)} and {len(sizes)}")


def _samples(pipe: Any, prompts: Sequence[str], sizes: Sequence[tuple[int, int]], seed: int) -> list[Sample]:
    family = family_of(denoiser(pipe)[1])
    samples = []
    for number, (prompt, (height, width)) in enumerate(zip(prompts, cycle(sizes), strict=False)):
        grid = family.grid(pipe, height, width)
        samples.append(Sample(prompt=prompt, seed=seed + number, height=height, width=width, grid=grid))
    return samples


def _write_shards(
    pipe: Any,
    samples: Sequence[Sample],
    directory: Path,
    settings: dict[str, Any],
    shards: list[dict[str, Any]],
    batch_size: int,
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    shard_size = settings["shard_size"]
    done = min(len(shards) * shard_size, len(samples))
    pipe.set_progress_bar_config(disable=True)
    with tqdm(total=len(samples), initial=done, unit="sample", desc="prepare") as progress:
        for start in range(done, len(samples), shard_size):
            part = dict(list(enumerate(samples))[start : start + shard_size])
            tensors: dict[str, Tensor] = {}
            for batch in _batches(part, batch_size):
                tensors |= _generate(pipe, batch, settings)
                progress.update(len(batch))
            file = directory / shard_name(start // shard_size)
            write_whole(file, partial(save_file, tensors))
            entries = [asdict(sample) for sample in part.values()]
            shards.append({"file": file.name, "bytes": file.stat().st_size, "samples": entries})
            conditions = sorted({key.partition(".")[2] for key in tensors} - {"latents"})
            write_json(
                directory / INDEX,
                {"format": FORMAT, "settings": settings | {"conditions": conditions}, "shards": shards},
            )
    logger.info("%s holds %d samples", directory, len(samples))


def _batches(part: dict[int, Sample], batch_size: int) -> Iterator[dict[int, Sample]]:
    buckets = defaultdict(list)
    for index, sample in part.items():
        buckets[sample.height, sample.width].append(index)
    for bucket in buckets.values():
        for start in range(0, len(bucket), batch_size):
            yield {index: part[index] for index in bucket[start : start + batch_size]}


@torch.no_grad()
def _generate(pipe: Any, batch: dict[int, Sample], settings: dict[str, Any]) -> dict[str, Tensor]:
    family = family_of(denoiser(pipe)[1])
    first = next(iter(batch.values()))
    conditions = family.encode(pipe, [sample.prompt for sample in batch.values()], settings["max_sequence_length"])
    latents = family.generate(
        pipe,
        conditions,
        height=first.height,
        width=first.width,
        steps=settings["steps"],
        guidance=settings["guidance"],
        generators=[torch.Generator("cpu").manual_seed(sample.seed) for sample in batch.values()],
    )
    parts = {"latents": latents, **conditions}
    return {
        f"{index:08d}.{name}": part[row].cpu().clone()
        for row, index in enumerate(batch)
        for name, part in parts.items()
    }


def _whole_shards(directory: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The leading shards that are there in full, made with these settings."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is not a folder")
    index = read_index(directory)
    if index is None:
        if directory.is_dir() and any(path for path in directory.iterdir() if not path.name.startswith(".")):
            raise ValueError(f"{directory} is not empty and holds no {INDEX}; name another folder")
        return []
    different = [
        f"{name} was {index['settings'].get(name)!r}, now {value!r}"
        for name, value in settings.items()
        if index["settings"].get(name) != value
    ]
    if different:
        raise ValueError(f"{directory} was made with other settings: {'; '.join(different)}")
    shards = []
    for shard in index["shards"]:
        if not shard_is_whole(directory, shard):
            break
        shards.append(shard)
    return shards


def fingerprint(model: torch.nn.Module) -> str:
    """Differs between models of other names, shapes, types or (where they are in memory) weights."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:
            digest.update(parameter.detach().flatten()[:8].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
