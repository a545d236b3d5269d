"""The moving average of what is trained (`trained.ema`), in float32: with it a student is judged and saved."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from torch import Tensor, nn


class Average:
    """diffusers' EMAModel, whose step n has the decay min(`decay`, n / (n + 9)), so that it forgets where it began.

    Args:
        trained: What the optimizer changes, by name.
        decay: 0: there is no average, and the weights themselves stand for it.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], decay: float) -> None:
        self.trained = trained
        self.decay = decay
        self.ema: EMAModel | None = None
        self.begin()

    def begin(self) -> None:
        """Begin with the weights as they are."""
        self.ema = EMAModel(self.trained.values(), decay=self.decay) if self.decay else None

    def remember_(self, tensors: Mapping[str, Tensor], *, steps: int) -> None:
        """Go on after so many steps, where `tensors` gave this."""
        if self.ema is not None:
            self.ema.shadow_params = [tensors[name] for name in self.trained]
            self.ema.optimization_step = steps

    def step(self) -> None:
        """Take in the weights as the optimizer has left them."""
        if self.ema is not None:
            self.ema.step(self.trained.values())

    def tensors(self) -> dict[str, Tensor]:
        """The average by the names of the weights; empty where there is none."""
        return {} if self.ema is None else dict(zip(self.trained, self.ema.shadow_params, strict=True))

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Inside, the weights hold their average; afterwards what they held before, to the last bit."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.trained.values())
        try:
            self.ema.copy_to(self.trained.values())
            yield
        finally:
            self.ema.restore(self.trained.values())
