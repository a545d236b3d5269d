"""How a loaded model stands: which of its attention is swapped, and which implementations a forward really runs."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .convert import swapped
from .families import family_of
from .layout import Grid, Layout
from .matching import attention_modules
from .networks import denoiser
from .report import SwapReport

ORIGINAL = "original"


def swap_report(pipe_or_model: Any) -> SwapReport | None:
    """What a conversion made of this model; None: it is not converted."""
    _, model = denoiser(pipe_or_model)
    kernels: dict[str, Any] = {name: module.linear_kernel for name, module in swapped(model).items()}
    if not kernels:
        return None
    family = family_of(model)
    candidates, skipped = attention_modules(model, family)
    return SwapReport(
        swapped={name: kernel.config for name, kernel in kernels.items()},
        skipped=skipped | {name: "not converted" for name in candidates if name not in kernels},
        family=family.name,
        impl=", ".join(sorted({kernel.impl for kernel in kernels.values()})),
    )


def describe_attention(pipe_or_model: Any) -> str:
    """One line: what is swapped, or that nothing is."""
    return str(swap_report(pipe_or_model) or "original attention")


def advice_on(model: nn.Module, grid: Grid) -> tuple[str, ...]:
    """What the converted attention of a model has to say about pictures of this grid, each sentence once."""
    kernels: list[Any] = [module.linear_kernel for module in swapped(model).values()]
    told = (kernel.advice(kernel.config, grid) for kernel in kernels)
    return tuple(dict.fromkeys(advice for advice in told if advice is not None))


@contextmanager
def implementations_seen(pipe_or_model: Any) -> Iterator[Counter[str]]:
    """Counts which implementation each kernel ran inside the context.

    A kernel whose window covers the picture is not called: the model makes its original call, and nothing is counted.
    """
    seen: Counter[str] = Counter()

    def note(kernel: Any, inputs: tuple[Tensor, Tensor, Tensor, Layout], _options: Any) -> None:
        query, _, _, layout = inputs
        picked = kernel.chosen(kernel.config, query, layout.grid, layout.text_len)
        seen[picked if kernel.impl == "auto" else kernel.impl] += 1

    modules: list[Any] = [module.linear_kernel for module in swapped(denoiser(pipe_or_model)[1]).values()]
    handles = [kernel.register_forward_pre_hook(note, with_kwargs=True) for kernel in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def describe_implementations(seen: Counter[str], model: nn.Module) -> str:
    """For one forward of `implementations_seen`: "tiled", or what ran where."""
    swaps = len(swapped(model))
    if original := swaps - seen.total():
        seen = seen + Counter({f"{ORIGINAL} (the window covers the picture)": original})
    return ", ".join(name if count == swaps else f"{count} x {name}" for name, count in seen.most_common())
