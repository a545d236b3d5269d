"""Communication between the processes of a launch; each holds the whole model and its share of a batch.

The trained weights are small compared with the model, so gradients are averaged once per step, after the last backward.
DistributedDataParallel does not fit: it expects every gradient in every process, through the model's own output, while
`layerwise.py` backpropagates within single layers, and some losses reach a weight in one process only.
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

from ..linearize.errors import error_text
from .diverged import DivergedError

USER_ERRORS = (ValueError, OSError, DivergedError)  # errors that end a run with their message alone
RAISED_BY_ALL = "All processes of the launch raise this."  # note on an error that every process raises
BUCKET_SIZE = 2**25  # elements per exchange
TIMEOUT = timedelta(hours=1)  # while the main process writes tens of GB to a slow disk; NCCL's default is ten minutes

Result = TypeVar("Result")


def start_accelerator(*, trackers: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """The accelerator of this launch, on CUDA if available, else on the CPU.

    Args:
        trackers: Installed trackers, by accelerate's names.
        folder: For the trackers' local files.
    Raises:
        ValueError: accelerate sees a different number of processes than were launched, or would shard the model.
    """
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise ValueError(
                f"the launcher asks for {name}, but distillation needs the whole model in each process: launch with "
                "`accelerate launch --multi_gpu --num_processes N`, which overrides accelerate's configuration"
            )
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # `pair.py` applies autocast: the teacher does not always use it
        # accelerate would otherwise read these from the environment:
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
        dynamo_backend="no",
        log_with=list(trackers) or None,
        project_dir=folder,
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ValueError(
            f"the launcher started {launched} processes, but accelerate joined {accelerator.num_processes}; "
            "launch with `accelerate launch --multi_gpu --num_processes N`, also on CPUs"
        )
    return accelerator


def on_main(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """Run `action` on the main process; all processes get its result, or raise its error if it is in `USER_ERRORS`."""
    outcome: list[Result | Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [action()]
        except USER_ERRORS as error:
            outcome = [_picklable(error)]
    (result,) = broadcast_object_list(outcome)
    if isinstance(result, USER_ERRORS):
        result.add_note(RAISED_BY_ALL)
        raise result
    return result


def make_on_main(accelerator: Accelerator, make: Callable[[], Result]) -> Result | None:
    """Make an object on the main process only; None in others. All raise its error if it is in `USER_ERRORS`."""
    made: list[Result] = []
    on_main(accelerator, lambda: made.append(make()))
    return made[0] if made else None


@contextmanager
def raise_together(accelerator: Accelerator) -> Iterator[None]:
    """If a process raises one of `USER_ERRORS` inside, all raise it on exit, so that none waits for a failed process.

    Inside, processes must not communicate.
    """
    own_error: Exception | None = None
    try:
        yield
    except USER_ERRORS as error:
        own_error = error
    errors = gather_object([own_error and _picklable(own_error)])
    failed = [process for process, error in enumerate(errors) if error]
    if not failed:
        return
    first = errors[failed[0]]
    if len(failed) == len(errors):
        first = own_error or first
    else:
        first = type(first)(f"process {failed[0]} of {len(errors)}: {first}")
    first.add_note(RAISED_BY_ALL)
    raise first


def _picklable(error: Exception) -> Exception:
    """The error as an instance of its base type in `USER_ERRORS`, which other processes can unpickle."""
    return next(kind for kind in USER_ERRORS if isinstance(error, kind))(error_text(error))


def average_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Average each gradient over the processes, in place; a missing gradient is treated as 0.

    Args:
        parameters: The same in every process, all of one dtype.
    """
    if accelerator.num_processes == 1:
        return
    parameters = list(parameters)
    has_gradient = torch.tensor([float(one.grad is not None) for one in parameters], device=accelerator.device)
    counts = accelerator.reduce(has_gradient, "sum").tolist()
    for bucket in _buckets(one for one, count in zip(parameters, counts, strict=True) if count):
        pieces = [torch.zeros_like(one) if one.grad is None else one.grad for one in bucket]
        means = accelerator.reduce(torch.cat([piece.flatten() for piece in pieces]), "mean")
        for one, mean in zip(bucket, means.split([piece.numel() for piece in pieces]), strict=True):
            if one.grad is None:
                one.grad = torch.empty_like(one)
            one.grad.copy_(mean.view_as(one))


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Groups of consecutive parameters, each closed once it has `BUCKET_SIZE` elements."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        bucket.append(parameter)
        size += parameter.numel()
        if size >= BUCKET_SIZE:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def broadcast_tensors(accelerator: Accelerator, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Broadcast the main process's tensors one by one; yields name and tensor, on the process's device.

    Args:
        tensors: Used on the main process only.
    """
    described = on_main(accelerator, lambda: {name: (one.shape, one.dtype) for name, one in tensors.items()})
    for name, (shape, dtype) in described.items():
        if accelerator.is_main_process:
            one = tensors[name].detach().to(accelerator.device).contiguous()  # as broadcast requires
        else:
            one = torch.empty(shape, dtype=dtype, device=accelerator.device)
        yield name, broadcast(one)
