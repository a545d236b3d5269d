"""The interface of every method."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ..layout import Grid, Layout


class Method(nn.Module):
    """The kernel of one attention module, made as `METHODS[type(config)](config, num_heads=H, head_dim=D)`.

    A method implements `forward` and `pairs`; the other members are defaults that fit most methods.
    """

    # {layer of the attention module: child of this module}: that layer's input x becomes x + child(x) (linfusion.py)
    input_terms: ClassVar[Mapping[str, str]] = {}
    # its weights are the same for every head: it may be called with some of the heads only (context parallelism)
    shared_across_heads: ClassVar[bool] = False
    # it does not take text along with the image: joint attention is refused
    image_alone: ClassVar[bool] = False
    impl: str = "auto"  # one of `implementations()`

    def __init__(self, config: Any, *, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.config = config

    @staticmethod
    def implementations() -> tuple[str, ...]:
        """Names that `impl` may take."""
        return ("auto", "torch")

    @staticmethod
    def auto_impl(config: Any, query: Tensor, grid: Grid, text_len: int) -> str:
        """What impl="auto" runs for a query [B, H, N, D]."""
        return "torch"

    @staticmethod
    def pairs(config: Any, grid: Grid, text_len: int, *, num_heads: int, head_dim: int) -> int:
        """Cost of one head in pairs of a query and a key under softmax, 4 D operations each.

        Budgets and operation counts use it; text_len and grid are those of one call.
        """
        raise NotImplementedError

    @staticmethod
    def advice(config: Any, grid: Grid) -> str | None:
        """A known weakness at this grid, in a sentence for the notes of a plan; None: none known."""
        return None

    def prepare_for(self, grid: Grid) -> None:
        """Called with each new grid before `forward`, outside traced code, to reject it or to prepare for it."""

    def is_exact(self, layout: Layout) -> bool:
        """Whether the method equals softmax over all pairs here, so that impl="auto" runs the original call instead."""
        return False

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float | None = None
    ) -> Tensor:
        """[B, H, N, D] each -> [B, H, N, D].

        Args:
            layout: Which of the N tokens belong to the image, and which text tokens may be attended to.
            scale: Scale of the logits; None: D**-0.5.
        """
        raise NotImplementedError
