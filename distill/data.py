"""The teacher's samples on disk, and their order in batches, which is fixed by the seed.

A folder holds `index.json` (settings, and per sample: prompt, seed, size), or one such file for each part, and
`shard-*.safetensors` with, for each sample, either the tensors `INDEX.latents` and `INDEX.NAME` for every condition, or
calls of the denoiser (`calls.py`). A batch has one size, because a forward takes one grid.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .calls import unpack
from .latent_functions import Conditions, Grid

INDEX = "index.json"
FORMAT = 3


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture of the teacher; its starting noise came from `manual_seed(seed)` on the CPU."""

    prompt: str
    seed: int
    height: int  # pixels
    width: int
    grid: Grid | None  # None if calls are kept, whose arguments hold it


@dataclass(frozen=True, kw_only=True)
class Batch:
    latents: Tensor  # [B, N, C], final and packed
    conditions: Conditions  # each [B, ...]
    grid: Grid

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        return Batch(
            latents=self.latents.to(device, dtype),
            conditions={name: one.to(device, dtype) for name, one in self.conditions.items()},
            grid=self.grid,
        )


class TeacherSamples:
    """The samples of a finished folder, read on demand.

    Raises:
        ValueError: the folder's samples are incomplete, or a shard does not have the size that the index says.
    """

    def __init__(self, directory: Path) -> None:
        index = read_index(directory)
        if index is None:
            raise ValueError(f"{directory} holds no {INDEX}; make the samples with `lineardit prepare`")
        entries = [entry for shard in index["shards"] for entry in shard["samples"]]
        expected = index["settings"]["num_prompts"]
        if len(entries) < expected:
            raise ValueError(
                f"{directory} holds {len(entries)} of {expected} samples; run `lineardit prepare` again, for every part"
            )
        for shard in index["shards"]:
            if not shard_is_complete(directory, shard):
                file = directory / shard["file"]
                raise ValueError(f"{file} is missing or truncated; run `lineardit prepare` again")
        self.directory = directory
        self.settings: Mapping[str, Any] = index["settings"]
        grids = [tuple(entry["grid"]) if entry["grid"] else None for entry in entries]
        self.samples = tuple(Sample(**{**entry, "grid": grid}) for entry, grid in zip(entries, grids, strict=True))
        self._shards: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def calls(self) -> int:
        """Denoiser calls kept per picture; 0: its final latents and conditions are kept instead."""
        return int(self.settings["calls"])

    @property
    def fingerprint(self) -> str:
        """Changes with any setting, prompt, seed or size."""
        content = json.dumps([self.settings, [vars(sample) for sample in self.samples]], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def load(self, indices: Sequence[int]) -> Batch:
        """The samples at these indices, which must share one grid."""
        rows = [self._read(index) for index in indices]
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        grid = self.samples[indices[0]].grid
        assert grid is not None, "recorded calls are read with `call`"
        return Batch(latents=stacked.pop("latents"), conditions=stacked, grid=grid)

    def call(self, index: int, number: int) -> dict[str, Any]:
        """The arguments of one kept call of this sample, 0 <= number < `calls`, in the order of denoising."""
        with self._shard(index) as shard:
            arguments = unpack(
                shard.metadata()[f"{index:08d}"], number, lambda key: shard.get_tensor(f"{index:08d}.{key}")
            )
            if any(isinstance(leaf, Tensor) and leaf.isnan().any() for leaf in tree_leaves(arguments)):
                raise ValueError(f"sample {index} contains NaN")
            return arguments

    def _read(self, index: int) -> dict[str, Tensor]:
        with self._shard(index) as shard:
            names = ("latents", *self.settings["conditions"])
            return {part: shard.get_tensor(f"{index:08d}.{part}") for part in names}

    @contextmanager
    def _shard(self, index: int) -> Iterator[Any]:
        """The shard of this sample, which stays open; read errors inside become a ValueError."""
        name = shard_name(index // self.settings["shard_size"])
        try:
            if name not in self._shards:
                self._shards[name] = safe_open(self.directory / name, framework="pt")
            yield self._shards[name]
        except (SafetensorError, LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.directory / name} cannot be read ({error}): remove it, and run `lineardit prepare` again"
            ) from error


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def shard_number(shard: Mapping[str, Any]) -> int:
    """The number in the file name of an index's entry."""
    return int(shard["file"].removeprefix("shard-").removesuffix(".safetensors"))


def index_name(part: int, parts: int) -> str:
    """File name of the index of one part of the samples."""
    return INDEX if parts == 1 else f"index-{part}-of-{parts}.json"


def shard_is_complete(directory: Path, shard: Mapping[str, Any]) -> bool:
    """Whether the file of this index entry has the size that the entry says."""
    path = directory / shard["file"]
    return path.is_file() and path.stat().st_size == shard["bytes"]


def read_index(directory: Path) -> dict[str, Any] | None:
    """The index of a folder, merged from all its parts; None if there is none.

    Raises:
        ValueError: a file is not an index of this format, or parts were made with different settings.
    """
    files = sorted([*directory.glob(INDEX), *directory.glob("index-*-of-*.json")])
    if not files:
        return None
    indexes = {file.name: _read_index_file(file) for file in files}
    (first, index), *others = indexes.items()
    for name, other in others:
        if other["settings"] != index["settings"]:
            raise ValueError(
                f"{directory}: {name} and {first} were made with different settings; make one of them again"
            )
    shards: dict[str, Mapping[str, Any]] = {}
    for shard in (shard for one in indexes.values() for shard in one["shards"]):
        if shard["file"] not in shards or shard_is_complete(directory, shard):  # prefer the entry that fits the file
            shards[shard["file"]] = shard
    return index | {"shards": [shards[name] for name in sorted(shards)]}


def _read_index_file(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): remove it, and run `lineardit prepare` again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT or not {"settings", "shards"} <= index.keys():
        raise ValueError(f"{path} is not an index of format {FORMAT}, as this version needs: make the samples again")
    if not _is_valid_index(index):
        raise ValueError(f"{path} is damaged: remove it, and run `lineardit prepare` again")
    return index


def _is_valid_index(index: Mapping[str, Any]) -> bool:
    """Whether the entries that are read exist and have the right types and ranges."""
    settings, shards = index["settings"], index["shards"]
    if not isinstance(settings, dict) or not isinstance(shards, list):
        return False
    counts = (settings.get("num_prompts"), settings.get("shard_size"), settings.get("calls"))
    if not all(type(count) is int and count >= least for count, least in zip(counts, (1, 1, 0), strict=True)):
        return False
    names = {field.name for field in fields(Sample)}
    return all(
        isinstance(shard, dict)
        and re.fullmatch(r"shard-\d{5}\.safetensors", str(shard.get("file")))
        and type(shard.get("bytes")) is int
        and isinstance(shard.get("samples"), list)
        and all(isinstance(entry, dict) and entry.keys() == names for entry in shard["samples"])
        for shard in shards
    )


def counter_generator(seed: int, step: int, position: int) -> torch.Generator:
    """The generator of one place in one step's batch, the same on every machine and for any number of processes."""
    (mixed,) = numpy.random.SeedSequence((seed, step, position)).generate_state(1, numpy.uint64)
    return torch.Generator("cpu").manual_seed(int(mixed))


class BatchOrder:
    """Which samples each step sees: epochs of shuffled batches, one size per batch, a function of seed and step.

    A size with fewer samples than a batch repeats them; samples that do not fill a batch are left out of the epoch.

    Args:
        samples: The training samples; batches hold indices into them.
        batch_size: Samples per step, over all processes.
    """

    def __init__(self, samples: Sequence[Sample], *, batch_size: int, seed: int) -> None:
        buckets = defaultdict(list)
        for index, sample in enumerate(samples):
            buckets[sample.height, sample.width].append(index)
        self.buckets = list(buckets.values())
        self.batch_size = batch_size
        self.seed = seed
        self.batches_per_epoch = sum(max(1, len(bucket) // batch_size) for bucket in self.buckets)
        self._epoch = -1
        self._batches: list[list[int]] = []

    def batch(self, step: int) -> list[int]:
        """Sample indices of a step, counted from 0."""
        epoch, position = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffle(epoch)
        return self._batches[position]

    def _shuffle(self, epoch: int) -> list[list[int]]:
        random = numpy.random.default_rng((self.seed, epoch))
        batches = [batch for bucket in self.buckets for batch in self._split(random.permutation(bucket))]
        return [batches[position] for position in random.permutation(len(batches))]

    def _split(self, shuffled: Any) -> Iterator[list[int]]:
        if len(shuffled) < self.batch_size:
            shuffled = numpy.resize(shuffled, self.batch_size)
        for start in range(0, len(shuffled) - self.batch_size + 1, self.batch_size):
            yield shuffled[start : start + self.batch_size].tolist()
