"""The processes of a launch: each holds the whole model and its share of a batch, and here they agree.

What is trained is small beside the model, so that gradients are exchanged once a step, after the last backward, and not
by DistributedDataParallel: that one wants every gradient in every process, through the model's own output, while a
lesson of `layerwise.py` ends in its layer and some losses reach a weight in one process alone.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from torch import Tensor, nn

from ..linearize.errors import told
from .diverged import DivergedError

SENTENCES = (ValueError, OSError, DivergedError)  # that end a run with their message alone
OF_ALL = "All processes of the launch raise this."  # a note that an error has
BUCKET = 2**25  # elements that are exchanged at once
WAIT = timedelta(hours=1)  # while the main process writes tens of GB to a slow disk; NCCL by itself waits ten minutes

Result = TypeVar("Result")


def start_accelerator(*, trackers: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """The processes of this launch, on CUDA where there is some, else on the CPU.

    Args:
        trackers: Names of accelerate's that are here.
        folder: For what they keep on this disk.
    Raises:
        ValueError: accelerate sees another number of processes than the launcher started, or shards the model.
    """
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise ValueError(
                f"the launcher asks for {name}, and a distillation holds the whole model in each process: launch with "
                "`accelerate launch --multi_gpu --num_processes N`, which overrides accelerate's configuration"
            )
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # autocast is ours: the teacher must not always have it
        # what accelerate would else read from its environment:
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
        dynamo_backend="no",
        log_with=list(trackers) or None,
        project_dir=folder,
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise ValueError(
            f"the launcher started {started} processes, accelerate joined {accelerator.num_processes}; "
            "launch with `accelerate launch --multi_gpu --num_processes N`, on CPUs as well"
        )
    return accelerator


def on_main(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """Do it on the main process; all processes get what it returns, or raise its error, if it is one of `SENTENCES`."""
    said: list[Result | Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            said = [action()]
        except SENTENCES as error:
            said = [_plain(error)]
    (result,) = broadcast_object_list(said)
    if isinstance(result, SENTENCES):
        result.add_note(OF_ALL)
        raise result
    return result


def main_has(accelerator: Accelerator, make: Callable[[], Result]) -> Result | None:
    """What the main process alone makes and keeps; all raise its error, if it is one of `SENTENCES`."""
    made: list[Result] = []
    on_main(accelerator, lambda: made.append(make()))
    return made[0] if made else None


@contextmanager
def all_or_none(accelerator: Accelerator) -> Iterator[None]:
    """What one process raises inside, if it is one of `SENTENCES`, all raise at the end, and none waits for it in vain.

    Inside, processes do not speak with one another.
    """
    mine: Exception | None = None
    try:
        yield
    except SENTENCES as error:
        mine = error
    found = gather_object([mine and _plain(mine)])
    failed = [process for process, error in enumerate(found) if error]
    if not failed:
        return
    first = found[failed[0]]
    if len(failed) == len(found):
        first = mine or first
    else:
        first = type(first)(f"process {failed[0]} of {len(found)}: {first}")
    first.add_note(OF_ALL)
    raise first


def _plain(error: Exception) -> Exception:
    """The same as one of `SENTENCES` that other processes can read."""
    return next(kind for kind in SENTENCES if isinstance(error, kind))(told(error))


def average_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """The mean of each gradient over the processes, in place; in a process that has none it counts as 0.

    Args:
        parameters: The same in every process, of one dtype.
    """
    if accelerator.num_processes == 1:
        return
    parameters = list(parameters)
    there = torch.tensor([float(one.grad is not None) for one in parameters], device=accelerator.device)
    anywhere = accelerator.reduce(there, "sum").tolist()
    for bucket in _buckets(one for one, count in zip(parameters, anywhere, strict=True) if count):
        pieces = [torch.zeros_like(one) if one.grad is None else one.grad for one in bucket]
        means = accelerator.reduce(torch.cat([piece.flatten() for piece in pieces]), "mean")
        for one, mean in zip(bucket, means.split([piece.numel() for piece in pieces]), strict=True):
            if one.grad is None:
                one.grad = torch.empty_like(one)
            one.grad.copy_(mean.view_as(one))


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """In order, as many together as make `BUCKET` elements."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        bucket.append(parameter)
        size += parameter.numel()
        if size >= BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def tensors_of_main(accelerator: Accelerator, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The main process' tensors by name, one after the other, in every process and on its device.

    Args:
        tensors: Other processes' are not looked at.
    """
    described = on_main(accelerator, lambda: {name: (one.shape, one.dtype) for name, one in tensors.items()})
    for name, (shape, dtype) in described.items():
        if accelerator.is_main_process:
            one = tensors[name].detach().to(accelerator.device).contiguous()  # as what sends it wants it
        else:
            one = torch.empty(shape, dtype=dtype, device=accelerator.device)
        yield name, broadcast(one)
