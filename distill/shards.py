"""Makes the shards of samples one after the other; complete ones are not made again.

Each part of the shards has its own index, and readers merge them, so that parts can also be made on machines that share
no disk, and copied into one folder.
"""

import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tqdm import tqdm

from ..linearize.folders import write_atomically
from ..pipelines.truncated_prompts import warn_truncated_prompts
from .data import FORMAT, INDEX, Sample, index_name, read_index, shard_is_complete, shard_name, shard_number
from .files import write_json
from .samples import ShardContent, final_latents, kept_calls

logger = logging.getLogger(__name__)

Shard = dict[int, Sample]  # by index


def write_shards(
    pipe: Any,
    samples: Sequence[Sample],
    directory: Path,
    settings: Mapping[str, Any],
    *,
    batch_size: int,
    part: tuple[int, int],
) -> None:
    """Make the missing and incomplete shards of this part, adding each to the index when it is done."""
    complete = _complete_shards(directory, settings)
    shards = _part_shards(samples, settings["shard_size"], part)
    if not shards:
        size = settings["shard_size"]
        logger.info("nothing to do for part %d of %d: there are fewer shards of %d samples", *part, size)
        return
    missing = {number: shard for number, shard in shards.items() if number not in complete}
    listed = [complete[number] for number in shards if number in complete]
    if settings["calls"]:
        logger.info("recording %d calls of the denoiser per picture, for training", settings["calls"])
    prompts = [sample.prompt for shard in missing.values() for sample in shard.values()]
    warn_truncated_prompts(pipe, prompts, settings["max_sequence_length"])
    pipe.set_progress_bar_config(disable=True)
    name = "prepare" if part[1] == 1 else f"prepare {part[0]}/{part[1]}"
    total = sum(map(len, shards.values()))
    with tqdm(total=total, initial=total - len(prompts), unit="sample", desc=name) as progress:
        for number, shard in missing.items():
            made = _make_shard(pipe, shard, settings, batch_size, progress)
            file = directory / shard_name(number)
            write_atomically(file, partial(save_file, made.tensors, metadata=made.texts))
            entries = [asdict(sample) for sample in shard.values()]
            listed.append({"file": file.name, "bytes": file.stat().st_size, "samples": entries})
            listed.sort(key=itemgetter("file"))
            conditions = set() if settings["calls"] else {key.partition(".")[2] for key in made.tensors} - {"latents"}
            content = {"settings": {**settings, "conditions": sorted(conditions)}, "shards": listed}
            write_json(directory / index_name(*part), {"format": FORMAT, **content})
    _log_totals(directory, settings, total, len(samples), part)


def _part_shards(samples: Sequence[Sample], size: int, part: tuple[int, int]) -> dict[int, Shard]:
    """Every n-th shard from the i-th on, by number."""
    numbered = list(enumerate(samples))
    return {
        number: dict(numbered[number * size : (number + 1) * size])
        for number in range(part[0] - 1, math.ceil(len(samples) / size), part[1])
    }


def _make_shard(pipe: Any, shard: Shard, settings: Mapping[str, Any], batch_size: int, progress: Any) -> ShardContent:
    made = ShardContent({}, {})
    make, size = (kept_calls, 1) if settings["calls"] else (final_latents, batch_size)
    for batch in _batches(shard, size):
        more = make(pipe, batch, settings)
        made = ShardContent(made.tensors | more.tensors, made.texts | more.texts)
        progress.update(len(batch))
    return made


def _batches(shard: Shard, batch_size: int) -> Iterator[Shard]:
    """Batches of at most `batch_size` samples of one size."""
    buckets = defaultdict(list)
    for index, sample in shard.items():
        buckets[sample.height, sample.width].append(index)
    for bucket in buckets.values():
        for start in range(0, len(bucket), batch_size):
            yield {index: shard[index] for index in bucket[start : start + batch_size]}


def _log_totals(directory: Path, settings: Mapping[str, Any], made: int, total: int, part: tuple[int, int]) -> None:
    """Log how many samples there are; for a part its own, since others may be running, and whether it was the last."""
    present = sum(len(shard["samples"]) for shard in _complete_shards(directory, settings).values())
    if part[1] == 1:
        logger.info("%s holds %d of %d samples", directory, present, total)
    else:
        last = f", which now holds all {total}" if present == total else ""
        logger.info("part %d of %d: its %d samples are in %s%s", *part, made, directory, last)


def _complete_shards(directory: Path, settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The complete shards by number; raises ValueError if the folder has other settings or contents."""
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
        raise ValueError(
            f"{directory} was made with other settings: {'; '.join(different)}: use those, or name another folder"
        )
    return {shard_number(shard): shard for shard in index["shards"] if shard_is_complete(directory, shard)}


def _is_foreign(path: Path) -> bool:
    """Whether no part wrote this file; some may have written an index since `read_index` found none."""
    return re.fullmatch(r"\..*|shard-\d{5}\.safetensors|index(-\d+-of-\d+)?\.json", path.name) is None
