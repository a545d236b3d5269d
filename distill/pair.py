"""Teacher and student, which are one model, each in its own precision."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..linearize.convert import swapped
from ..linearize.measures.recording import Arguments, predict, to_device
from .student import teacher, trained_parameters


class Pair:
    """A student of `build_student_`, and the teacher inside it.

    Args:
        dtype: Of the frozen weights.
        mixed: Whether the student computes in bfloat16.
    Attributes:
        layers: The swapped attention modules, by name.
        trained: The trained parameters, by name.
    """

    def __init__(self, model: nn.Module, *, device: torch.device, dtype: torch.dtype, mixed: bool) -> None:
        self.model: Any = model
        self.device = device
        self.dtype = dtype
        self.mixed = mixed
        self.layers: Mapping[str, nn.Module] = swapped(model)
        self.trained = trained_parameters(model)

    def as_student(self) -> AbstractContextManager[Any]:
        """The student's precision; the model itself needs no change."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed)

    def native(self) -> AbstractContextManager[Any]:
        """The teacher's precision: a bfloat16 base runs without autocast and so matches the original bit for bit."""
        return nullcontext() if self.dtype == torch.bfloat16 else self.as_student()

    @contextmanager
    def as_teacher(self) -> Iterator[None]:
        """Inside, the model is the teacher, in the teacher's precision and without gradients."""
        with teacher(self.model), self.native():
            yield

    def predict(self, arguments: Arguments) -> torch.Tensor:
        """The model's prediction in its current role."""
        return predict(self.model, to_device(arguments, self.device))
