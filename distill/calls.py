"""Calls of a teacher's denoiser, on the disk: what is kept of models whose noise and time distillation does not know.

Of one picture a shard holds tensors `INDEX.NUMBER`, each once however often it is used, and in its header, under
`INDEX`, the arguments of every call as JSON: a tensor there is {"tensor": NUMBER}, a tuple {"tuple": [...]}, a
dictionary {"dict": {...}}.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..linearize.measures.recording import Arguments, Prediction


def chosen_calls(made: Sequence[Prediction], count: int, seed: int) -> list[Prediction]:
    """`count` calls of a picture, one from each of as many equal parts of it; all where there are no more.

    Args:
        made: In the order of denoising.
        seed: Says which of each part.
    """
    if len(made) <= count:
        return list(made)
    starts = [part * len(made) // count for part in range(count + 1)]
    generator = torch.Generator("cpu").manual_seed(seed)
    return [made[int(torch.randint(first, end, (), generator=generator))] for first, end in itertools.pairwise(starts)]


def pack(calls: Sequence[Arguments], prefix: str) -> tuple[dict[str, Tensor], str]:
    """Tensors by their name in the shard, and the JSON that says where they stand.

    Raises:
        ValueError: an argument is neither a tensor nor what JSON has.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[int, int] = {}  # of tensors that were met, by id

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
        raise ValueError(f"calls of this model cannot be kept: its argument {name} is a {type(value).__name__}")

    written = [{name: write(value, name) for name, value in arguments.items()} for arguments in calls]
    return tensors, json.dumps(written)


def unpack(written: str, call: int, tensor: Callable[[int], Tensor]) -> dict[str, Any]:
    """The arguments of one call.

    Args:
        written: The JSON of `pack`.
        tensor: Gives the tensor of a number.
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
