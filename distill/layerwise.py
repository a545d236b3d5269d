"""The optional first phase: each swapped layer learns the teacher's attention output on the teacher's own inputs.

    L = sum_layers mean_samples |a_s - a_t|^2 / |a_t|^2

a_s and a_t are an attention module's outputs as student and as teacher for the same input, that of the teacher's
forward; |.|^2 is the sum over all elements of a sample, image and text, in float32. Methods that change the formula of
attention start far from the teacher; in this phase a layer's error does not reach the next layer.

One forward of the model without gradients trains all layers. It runs as a student's forward, so that the seam publishes
every grid as usual; but each swapped module returns the teacher's output, and later layers see the teacher's
activations bit for bit. Before that, the module runs as the student on the same arguments, with gradients, and its
error is then backpropagated through this module alone. So there is no backward through the model, memory holds the
graph of one layer at a time, and gradient checkpointing has no effect.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..linearize.convert import swapped
from .student import teacher

Output = Tensor | tuple[Tensor, ...]  # the image's, or (image, text) of a joint attention
Precision = Callable[[], AbstractContextManager[Any]]


def layer_error(student: Output, teacher: Output) -> Tensor:
    """The relative error of one layer: 0 for the teacher's own output, 1 for zeros; a float32 scalar."""
    outputs, targets = (output if isinstance(output, tuple) else (output,) for output in (student, teacher))
    pairs = [(s.float().flatten(1), t.float().flatten(1)) for s, t in zip(outputs, targets, strict=True)]
    error = torch.stack([(s - t).square().sum(1) for s, t in pairs]).sum(0)  # [B]
    return (error / torch.stack([t.square().sum(1) for _, t in pairs]).sum(0)).mean()


@contextmanager
def layerwise_training(
    model: nn.Module, precision: Precision, *, loss_scale: float = 1.0
) -> Iterator[dict[str, Tensor]]:
    """Make each forward of a student, called under no_grad, the teacher's, and add gradients to every swapped module.

    All hooks are removed on exit.

    Args:
        model: A student of `build_student_`.
        precision: The context in which a module runs as the student.
        loss_scale: Factor of the loss.
    Yields:
        Each module's error in the last forward, by name.
    """
    errors: dict[str, Tensor] = {}
    with ExitStack() as cleanup:
        for name, module in swapped(model).items():
            hooks = _ModuleHooks(model, precision, loss_scale, partial(errors.__setitem__, name))
            cleanup.callback(hooks.teacher_context.close)
            cleanup.callback(module.register_forward_pre_hook(hooks.run_student, with_kwargs=True).remove)
            cleanup.callback(module.register_forward_hook(hooks.backward_error).remove)
        yield errors


class _ModuleHooks:
    """The hooks of one module, before and after its forward, which runs as the teacher."""

    def __init__(
        self, model: nn.Module, precision: Precision, loss_scale: float, record: Callable[[Tensor], None]
    ) -> None:
        self.model = model
        self.precision = precision
        self.loss_scale = loss_scale
        self.record = record
        self.teacher_context = ExitStack()
        self.student_output: Output = ()

    def run_student(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.enable_grad(), self.precision():
            self.student_output = module.forward(*args, **kwargs)  # not module(...), which would call this hook again
        self.teacher_context.enter_context(teacher(self.model))

    def backward_error(self, module: nn.Module, args: tuple[Any, ...], output: Output) -> None:
        self.teacher_context.close()
        device = next(module.parameters()).device
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            error = layer_error(self.student_output, output)
            if error.requires_grad:  # else nothing of this module is trained
                (self.loss_scale * error).backward()
        self.student_output = ()
        self.record(error.detach())
