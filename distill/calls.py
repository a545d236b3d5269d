"""Storage of a teacher's denoiser calls, for models whose noise and time conventions distillation does not know.

For each picture a shard holds tensors `INDEX.NUMBER`, each stored once however often it is used. The shard's header
holds, under `INDEX`, the arguments of every call as JSON: a tensor is {"tensor": NUMBER}, a tuple {"tuple": [...]}, a
dictionary {"dict": {...}}.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..linearize.measures.recording import Arguments, Prediction


def sample_calls(predictions: Sequence[Prediction], count: int, seed: int) -> list[Prediction]:
    """Choose `count` calls of a picture, a random one from each of `count` equal parts; all if there are no more.

    Args:
        predictions: In the order of denoising.
        seed: Of the random choice.
    """
    if len(predictions) <= count:
        return list(predictions)
    starts = [part * len(predictions) // count for part in range(count + 1)]
    generator = torch.Generator("cpu").manual_seed(seed)
    return [
        predictions[int(torch.randint(first, end, (), generator=generator))]
        for first, end in itertools.pairwise(starts)
    ]


def pack(calls: Sequence[Arguments], prefix: str) -> tuple[dict[str, Tensor], str]:
    """The tensors by their name in the shard, and the JSON of the arguments, which refers to them.

    Raises:
        ValueError: an argument holds something other than tensors and JSON values.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[int, int] = {}  # of the tensors seen so far, by id

    def write(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            number = numbers.setdefault(id(value), len(numbers))
            tensors[f"{prefix}.{number}"] = value.contiguous()
            return {"tensor": number}
        if isinstance(value, tuple | torch.Size):
            return {"tuple": [write(one, name) for one in value]}
        if isinstance(value, list):
            return [write(one, name) for one in value]
        if isinstance(value, Mapping):
            return {"dict": {key: write(one, name) for key, one in value.items()}}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ValueError(f"calls of this model cannot be recorded: its argument {name} is a {type(value).__name__}")

    written = [{name: write(value, name) for name, value in arguments.items()} for arguments in calls]
    return tensors, json.dumps(written)


def unpack(written: str, call: int, tensor: Callable[[int], Tensor]) -> dict[str, Any]:
    """The arguments of one call.

    Args:
        written: The JSON of `pack`.
        tensor: Returns the tensor of a number.
    """

    def read(value: Any) -> Any:
        if isinstance(value, list):
            return [read(one) for one in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensor(content)
        if kind == "tuple":
            return tuple(read(one) for one in content)
        return {key: read(one) for key, one in content.items()}

    return {name: read(value) for name, value in json.loads(written)[call].items()}
