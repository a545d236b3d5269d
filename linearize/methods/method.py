"""What every method is to the models that it is put into."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ..layout import Grid, Layout


class Method(nn.Module):
    """The kernel of one attention module, made as `METHODS[type(config)](config, num_heads=H, head_dim=D)`.

    A method has `forward` and `pairs`. The rest says what is so of most of them, and is overridden where it is not.
    """

    # {layer of the attention module: child of this module}: that layer's input x becomes x + child(x) (linfusion.py)
    input_terms: ClassVar[Mapping[str, str]] = {}
    heads_alike: ClassVar[bool] = False  # its weights are the same for every head: it may be given some of them
    image_alone: ClassVar[bool] = False  # it has no place for text beside the image: joint attention is refused
    impl: str = "auto"  # one of `implementations()`

    def __init__(self, config: Any, *, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.config = config

    @staticmethod
    def implementations() -> tuple[str, ...]:
        """Names that `impl` may take."""
        return ("auto", "torch")

    @staticmethod
    def chosen(config: Any, query: Tensor, grid: Grid, text_len: int) -> str:
        """What impl="auto" runs for a query [B, H, N, D]."""
        return "torch"

    @staticmethod
    def pairs(config: Any, grid: Grid, text_len: int, *, num_heads: int, head_dim: int) -> int:
        """Pairs of a query and a key that cost as much, of one head: what budgets and operation counts are made of."""
        raise NotImplementedError

    @staticmethod
    def advice(config: Any, grid: Grid) -> str | None:
        """What pictures of this grid may suffer from, for a plan's notes."""
        return None

    def observe(self, grid: Grid) -> None:
        """Told each new grid before its first call, outside of traced code: to refuse it, or to prepare for it."""

    def covers(self, layout: Layout) -> bool:
        """Whether the method is the base's attention there, every pair attending: the base's own call then runs."""
        return False

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float | None = None
    ) -> Tensor:
        """[B, H, N, D] each -> [B, H, N, D]; scale: of the logits, None: 1 / sqrt(D)."""
        raise NotImplementedError
