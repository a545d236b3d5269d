"""CLEAR's objective (arXiv:2412.16112): the data, the teacher's prediction, the teacher's attention outputs.

    L = w_flow |s - (noise - x)|^2  +  w_prediction |s - t|^2  +  w_attention mean_layers |a_s - a_t|^2

x are the final latents of a teacher's sample, s and t the predictions of student and teacher for
(1 - sigma) x + sigma noise, a the output of an attention module. |.|^2 is the mean over all elements, in float32.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

from ..linearize.measures.recording import to_device
from .batches import MicroBatch
from .config import Loss
from .pair import Pair

Outputs = dict[str, tuple[Tensor, ...]]  # module name -> image output, or (image, text) of a joint attention


def loss_terms(pair: Pair, micro_batch: MicroBatch, names: Collection[str]) -> dict[str, Tensor]:
    """The requested terms of the objective, differentiable in the student.

    Args:
        names: Any of "flow", "prediction" and "attention"; the teacher runs for the last two only.
    """
    arguments = to_device(micro_batch.arguments, pair.device)
    layers = pair.layers if "attention" in names else {}
    theirs: Outputs = {}
    if "prediction" in names or layers:
        with attention_outputs(layers) as theirs, pair.as_teacher():
            target = pair.predict(arguments)
    with attention_outputs(layers) as ours, pair.as_student():
        prediction = pair.predict(arguments)
    terms: Mapping[str, Callable[[], Tensor]] = {
        "flow": lambda: flow_loss(prediction, cast(Tensor, micro_batch.latents), cast(Tensor, micro_batch.noise)),
        "prediction": lambda: prediction_loss(prediction, target),
        "attention": lambda: attention_loss(ours, theirs),
    }
    return {name: terms[name]() for name in names}


def flow_loss(student: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Flow matching loss: the target is the velocity `noise - latents`. All [B, N, C]; a float32 scalar."""
    return mse_loss(student.float(), noise.float() - latents.float())


def prediction_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error between two predictions of the same shape; a float32 scalar."""
    return mse_loss(student.float(), teacher.float())


def attention_loss(student: Outputs, teacher: Outputs) -> Tensor:
    """Mean squared error of the attention outputs: over all elements of a layer, then over layers."""
    # checkpointed, or the graph would keep float32 copies of both outputs of every layer
    losses = [checkpoint(_layer_loss, student[name], teacher[name], use_reentrant=False) for name in teacher]
    return torch.stack(losses).mean()


def _layer_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    squares = sum(mse_loss(s.float(), t.float(), reduction="sum") for s, t in zip(student, teacher, strict=True))
    return torch.as_tensor(squares) / sum(t.numel() for t in teacher)


def weighted_sum(terms: Mapping[str, Tensor], weights: Loss) -> Tensor:
    """The objective; `terms` holds the terms with weight above 0."""
    return torch.stack([asdict(weights)[name] * term for name, term in terms.items()]).sum()


@contextmanager
def attention_outputs(modules: Mapping[str, nn.Module]) -> Iterator[Outputs]:
    """Collect the outputs of these modules while the context is open.

    Close it before the backward pass: gradient checkpointing runs the modules again.
    """
    outputs: Outputs = {}

    def collect(name: str, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs[name] = output if isinstance(output, tuple) else (output,)

    handles = [
        module.register_forward_hook(lambda _module, _args, output, name=name: collect(name, output))
        for name, module in modules.items()
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
