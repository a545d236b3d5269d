"""The teacher makes its own training samples: final latents and what it was told, never decoded and encoded again.

Several processes may work at one set of samples, each on its part of the shards. Each writes an index of its own, which
readers take together, so that parts can also be made on machines that share no disk, and copied into one folder.
"""

import hashlib
import json
import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import cycle
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..linearize.convert import denoiser, swapped
from ..linearize.folders import write_whole
from .data import FORMAT, INDEX, Sample, index_name, read_index, shard_is_whole, shard_name, shard_number
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
    part: tuple[int, int] = (1, 1),
) -> Path:
    """Generate one sample per prompt into a folder; called again, make the shards that are not there yet.

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
        part: (i, n), counted from 1: only every n-th shard, from the i-th on; calls for the others may run beside.
    Returns:
        The folder, which `TeacherSamples` reads.
    Raises:
        ValueError: a setting is out of range, differs from those of the folder, the pipeline is converted, or it made
            latents that are not finite.
    """
    _, model = denoiser(pipe)
    _check(model, prompts, sizes, {"steps": steps, "batch_size": batch_size, "shard_size": shard_size})
    if not 1 <= part[0] <= part[1]:
        raise ValueError(f"part must be (i, n) with 1 <= i <= n, got {part}")
    samples = _samples(pipe, prompts, sizes, seed)
    settings = _about(model, prompts) | {
        "sizes": [list(size) for size in sizes],
        "steps": steps,
        "guidance": float(guidance),
        "seed": seed,
        "max_sequence_length": max_sequence_length,
        "shard_size": shard_size,
    }
    directory = Path(directory)
    _write_shards(pipe, samples, directory, settings, batch_size, part)
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


def _about(model: torch.nn.Module, prompts: Sequence[str]) -> dict[str, Any]:
    return {
        "teacher": fingerprint(model),
        "model": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "num_prompts": len(prompts),
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16],
    }


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
    batch_size: int,
    part: tuple[int, int],
) -> None:
    """Make the shards of this part that are not there in full, and list each as it is done."""
    whole = _whole_shards(directory, settings)
    index_file, size = directory / index_name(*part), settings["shard_size"]
    numbered = list(enumerate(samples))
    shards = {
        number: dict(numbered[number * size : (number + 1) * size])
        for number in range(part[0] - 1, math.ceil(len(samples) / size), part[1])
    }
    directory.mkdir(parents=True, exist_ok=True)
    listed = [whole[number] for number in shards if number in whole]
    pipe.set_progress_bar_config(disable=True)
    name = "prepare" if part[1] == 1 else f"prepare {part[0]}/{part[1]}"
    total = sum(map(len, shards.values()))
    done = sum(len(shard["samples"]) for shard in listed)
    if not shards:
        logger.info("nothing to do for part %d of %d: there are fewer shards of %d samples", *part, size)
        return
    with tqdm(total=total, initial=done, unit="sample", desc=name) as progress:
        for number, of_shard in shards.items():
            if number in whole:
                continue
            tensors: dict[str, Tensor] = {}
            for batch in _batches(of_shard, batch_size):
                tensors |= _generate(pipe, batch, settings)
                progress.update(len(batch))
            file = directory / shard_name(number)
            write_whole(file, partial(save_file, tensors))
            entries = [asdict(sample) for sample in of_shard.values()]
            listed.append({"file": file.name, "bytes": file.stat().st_size, "samples": entries})
            listed.sort(key=itemgetter("file"))
            conditions = sorted({key.partition(".")[2] for key in tensors} - {"latents"})
            content = {"format": FORMAT, "settings": settings | {"conditions": conditions}, "shards": listed}
            write_json(index_file, content)
    made = sum(len(shard["samples"]) for shard in _whole_shards(directory, settings).values())
    logger.info("%s holds %d of %d samples", directory, made, len(samples))


def _batches(samples: dict[int, Sample], batch_size: int) -> Iterator[dict[int, Sample]]:
    buckets = defaultdict(list)
    for index, sample in samples.items():
        buckets[sample.height, sample.width].append(index)
    for bucket in buckets.values():
        for start in range(0, len(bucket), batch_size):
            yield {index: samples[index] for index in bucket[start : start + batch_size]}


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
    for sample, one in zip(batch.values(), latents, strict=True):
        if not one.isfinite().all():
            raise ValueError(
                f"the teacher's latents for {sample.prompt!r} with seed {sample.seed} are not finite in {one.dtype}: "
                "in another folder, load it in another dtype (--dtype) or leave this prompt out"
            )
    parts = {"latents": latents, **conditions}
    return {
        f"{index:08d}.{name}": one[row].cpu().clone() for row, index in enumerate(batch) for name, one in parts.items()
    }


def _whole_shards(directory: Path, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The shards that are there in full, made with these settings, by their number."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is not a folder")
    index = read_index(directory)
    if index is None:
        if directory.is_dir() and any(path for path in directory.iterdir() if _is_foreign(path)):
            raise ValueError(f"{directory} is not empty and holds no {INDEX}; name another folder")
        return {}
    different = [
        f"{name} was {index['settings'].get(name)!r}, now {value!r}"
        for name, value in settings.items()
        if index["settings"].get(name) != value
    ]
    if different:
        raise ValueError(f"{directory} was made with other settings: {'; '.join(different)}")
    return {shard_number(shard): shard for shard in index["shards"] if shard_is_whole(directory, shard)}


def _is_foreign(path: Path) -> bool:
    """Whether no part, of which some may have written their index meanwhile, has put this file there."""
    return re.fullmatch(r"\..*|shard-\d{5}\.safetensors|index(-\d+-of-\d+)?\.json", path.name) is None


def fingerprint(model: torch.nn.Module, dtype: torch.dtype | None = None) -> str:
    """Differs between models of other names, shapes, types or (where they are in memory) weights.

    Args:
        dtype: Of the weights, as if the model were in it; None: their own.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {dtype or parameter.dtype}".encode())
        if not parameter.is_meta:
            first = parameter.detach().flatten()[:8].to(dtype or parameter.dtype)
            digest.update(first.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
