"""The teacher makes its own training samples, never decoded and encoded again.

Of FLUX.1, final latents and what it was told: training adds noise of its own. Of any other model, some of the calls of
its denoiser on the way (`calls.py`), which need no knowledge of how it was trained; a guided model's are of both
branches.

Several processes may work at one set of samples, each on its part of the shards. Each writes an index of its own, which
readers take together, so that parts can also be made on machines that share no disk, and copied into one folder.
"""

import hashlib
import json
import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
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

from ..linearize import families as conversions
from ..linearize.calling import own_settings
from ..linearize.convert import swapped
from ..linearize.folders import write_whole
from ..linearize.locks import held, remove_leftovers
from ..linearize.networks import denoiser
from ..pipelines.cut_prompts import tell_cut_prompts
from ..pipelines.sizes import check_size, default_size
from .data import FORMAT, INDEX, Sample, index_name, read_index, shard_is_whole, shard_name, shard_number
from .families import family_of, has_row
from .files import write_json
from .identity import architecture, dtype_name, fingerprint, main_dtype
from .samples import call_of_teacher, final_latents, kept_calls

logger = logging.getLogger(__name__)

CALLS = 4  # kept of a picture


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
    """Generate one sample per prompt into a folder; called again, make the shards that are not there yet.

    The noise of sample i comes from `torch.Generator("cpu").manual_seed(seed + i)`: `batch_size`, of final latents, is
    about speed only. Where calls are kept, pictures are made one at a time.

    Args:
        pipe: The original pipeline, on the device where it shall run.
        prompts: One per sample; repeat a prompt to get it with several seeds.
        directory: New, or that of an interrupted call with the same settings.
        sizes: (height, width) in pixels; sample i has sizes[i % len(sizes)]. None: the pipeline's own, for all.
        steps: Denoising steps; None: the pipeline's own.
        guidance: `guidance_scale` of the pipeline; None: the pipeline's own.
        max_sequence_length: Text tokens; None: the pipeline's own.
        calls: Keep so many calls of the denoiser of each picture; 0: its final latents, for FLUX.1 alone. None: 0 for
            FLUX.1, else 4.
        arguments: Of the pipeline's call besides, such as {"negative_prompt": "blurry"}, where calls are kept.
        shard_size: Samples per file, which stay in memory until it is written; None: 64, or 8 where calls are kept.
        part: (i, n), counted from 1: only every n-th shard, from the i-th on; calls for the others may run beside.
    Returns:
        The folder, which `TeacherSamples` reads.
    Raises:
        UnsupportedModelError: the model's class is not known.
        ValueError: a setting is out of range or not known to the pipeline, differs from those of the folder, the
            pipeline is converted, another process makes this part, or it made numbers that are not finite.
    """
    _, model = denoiser(pipe)
    conversions.family_of(model)
    if calls is None:
        calls = 0 if has_row(model) else CALLS
    own = own_settings(pipe)
    sizes = sizes if sizes is not None else [default_size(pipe)]
    steps = steps if steps is not None else own.steps or 28
    shard_size = shard_size if shard_size is not None else 8 if calls else 64
    counts = {"steps": steps, "batch_size": batch_size, "shard_size": shard_size}
    _check(model, prompts, sizes, counts | {"max_sequence_length": max_sequence_length})
    _check_calls(model, calls, arguments)
    if guidance is not None and not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite, got {guidance}")
    try:
        arguments = json.loads(json.dumps(dict(arguments or {}))) or None
    except TypeError as error:
        raise ValueError(f"arguments must be what JSON has, to be written down with the samples: {error}") from error
    if not 1 <= part[0] <= part[1]:
        raise ValueError(f"part must be (i, n) with 1 <= i <= n, got {part}")
    settings = _about(model, prompts) | {
        "sizes": [list(size) for size in sizes],
        "steps": steps,
        "guidance": own.guidance if guidance is None else float(guidance),
        "seed": seed,
        "max_sequence_length": own.max_sequence_length if max_sequence_length is None else max_sequence_length,
        "calls": calls,
        "arguments": arguments,
        "shard_size": shard_size,
    }
    samples = _samples(pipe, prompts, sizes, settings)
    if calls:
        call_of_teacher(pipe, sizes[0], settings)  # raises for a setting that is none, before anything is made
    directory = Path(directory)
    with held(directory, name=f".{index_name(*part)}.lock"):
        remove_leftovers(directory, ("shard-*", "index*"), locks=".index*.lock")
        _write_shards(pipe, samples, directory, settings, batch_size, part)
    return directory


def _check(
    model: torch.nn.Module,
    prompts: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    counts: Mapping[str, int | None],
) -> None:
    if swapped(model):
        raise ValueError("pipe must be the original pipeline, got a converted one; call restore_ first")
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if not prompts or not sizes:
        raise ValueError(f"prompts and sizes must not be empty, got {len(prompts)} and {len(sizes)}")


def _check_calls(model: torch.nn.Module, calls: int, arguments: Mapping[str, Any] | None) -> None:
    if calls < 0:
        raise ValueError(f"calls must be >= 0, got {calls}")
    if arguments and not calls:
        raise ValueError(f"final latents are made without other arguments: keep calls (--calls 4), got {arguments}")
    dtype = main_dtype(model)
    if calls and dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"calls must be made in float32 or bfloat16, in which they will be learnt from, got {dtype}: load the "
            "pipeline in another dtype (--dtype)"
        )


def _about(model: torch.nn.Module, prompts: Sequence[str]) -> dict[str, Any]:
    return {
        "teacher": fingerprint(model, torch.bfloat16),
        "model": type(model).__name__,
        "architecture": architecture(model),
        "dtype": dtype_name(main_dtype(model)),
        "num_prompts": len(prompts),
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16],
    }


def _samples(
    pipe: Any, prompts: Sequence[str], sizes: Sequence[tuple[int, int]], settings: Mapping[str, Any]
) -> list[Sample]:
    family = None if settings["calls"] else family_of(denoiser(pipe)[1])
    for size in sizes:
        check_size(pipe, *size)
    samples = []
    for number, (prompt, (height, width)) in enumerate(zip(prompts, cycle(sizes), strict=False)):
        grid = family.grid(pipe, height, width) if family else None
        seed = settings["seed"] + number
        samples.append(Sample(prompt=prompt, seed=seed, height=height, width=width, grid=grid))
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
    make = final_latents
    if settings["calls"]:
        make, batch_size = kept_calls, 1
        logger.info("keeping %d calls of the denoiser of each picture, to be learnt from", settings["calls"])
    name = "prepare" if part[1] == 1 else f"prepare {part[0]}/{part[1]}"
    total = sum(map(len, shards.values()))
    done = sum(len(shard["samples"]) for shard in listed)
    if not shards:
        logger.info("nothing to do for part %d of %d: there are fewer shards of %d samples", *part, size)
        return
    to_make = [sample.prompt for number in shards if number not in whole for sample in shards[number].values()]
    tell_cut_prompts(pipe, to_make, settings["max_sequence_length"])
    with tqdm(total=total, initial=done, unit="sample", desc=name) as progress:
        for number, of_shard in shards.items():
            if number in whole:
                continue
            tensors: dict[str, Tensor] = {}
            texts: dict[str, str] = {}
            for batch in _batches(of_shard, batch_size):
                made = make(pipe, batch, settings)
                tensors |= made.tensors
                texts |= made.texts
                progress.update(len(batch))
            file = directory / shard_name(number)
            write_whole(file, partial(save_file, tensors, metadata=texts))
            entries = [asdict(sample) for sample in of_shard.values()]
            listed.append({"file": file.name, "bytes": file.stat().st_size, "samples": entries})
            listed.sort(key=itemgetter("file"))
            names = set() if settings["calls"] else {key.partition(".")[2] for key in tensors} - {"latents"}
            content = {"format": FORMAT, "settings": settings | {"conditions": sorted(names)}, "shards": listed}
            write_json(index_file, content)
    there = sum(len(shard["samples"]) for shard in _whole_shards(directory, settings).values())
    logger.info("%s holds %d of %d samples", directory, there, len(samples))


def _batches(samples: dict[int, Sample], batch_size: int) -> Iterator[dict[int, Sample]]:
    buckets = defaultdict(list)
    for index, sample in samples.items():
        buckets[sample.height, sample.width].append(index)
    for bucket in buckets.values():
        for start in range(0, len(bucket), batch_size):
            yield {index: samples[index] for index in bucket[start : start + batch_size]}


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
