"""The moving average of the trained weights (`trained.ema`), in float32; a student is validated and saved with it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from torch import Tensor, nn


class WeightAverage:
    """diffusers' EMAModel; step n has the decay min(`decay`, n / (n + 9)), so that the initial weights fade quickly.

    Args:
        trained: The trained parameters, by name.
        decay: 0: no average; the weights themselves are used.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], decay: float) -> None:
        self.trained = trained
        self.decay = decay
        self.ema: EMAModel | None = None
        self.begin()

    def begin(self) -> None:
        """Start the average from the current weights."""
        self.ema = EMAModel(self.trained.values(), decay=self.decay) if self.decay else None

    def load_tensors_(self, tensors: Mapping[str, Tensor], *, steps: int) -> None:
        """Restore the average from its `tensors()` after this many steps."""
        if self.ema is not None:
            self.ema.shadow_params = [tensors[name] for name in self.trained]
            self.ema.optimization_step = steps

    def step(self) -> None:
        """Update the average with the current weights."""
        if self.ema is not None:
            self.ema.step(self.trained.values())

    def tensors(self) -> dict[str, Tensor]:
        """The averaged weights by name; empty if there is no average."""
        return {} if self.ema is None else dict(zip(self.trained, self.ema.shadow_params, strict=True))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the weights hold their average; on exit the previous values are restored bit for bit."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.trained.values())
        try:
            self.ema.copy_to(self.trained.values())
            yield
        finally:
            self.ema.restore(self.trained.values())
