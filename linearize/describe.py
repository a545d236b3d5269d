"""What a loaded model runs: which of its attention is swapped, and which implementations a forward uses."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, cast

from torch import Tensor, nn

from .convert import swapped
from .families import family_of
from .layout import Grid, Layout
from .matching import attention_modules
from .networks import denoiser
from .report import SwapReport
from .seam.conversion import conversion_of
from .seam.original import COVERED, dense_below_text


def swap_report(pipe_or_model: Any) -> SwapReport | None:
    """The report on this model's conversion; None: it is not converted."""
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
        dense_below=dense_below_of(model),
    )


def describe_attention(pipe_or_model: Any) -> str:
    """One line: what is swapped, or that nothing is."""
    return str(swap_report(pipe_or_model) or "original attention")


def dense_below_of(model: nn.Module) -> int:
    """Image tokens of a call below which the converted modules of a model make their original call; 0: never."""
    conversion, modules = conversion_of(model), swapped(model).values()
    forced = any(cast(Any, module).linear_kernel.impl != "auto" for module in modules)
    return 0 if conversion is None or forced else conversion.dense_tokens


def advice_on(model: nn.Module, grids: Sequence[Grid]) -> tuple[str, ...]:
    """Advice from a model's converted attention on a picture made in stages of these grids, each sentence once.

    Args:
        grids: Grids of the stages with converted attention; the last one is the picture's.
    """
    kernels: list[Any] = [module.linear_kernel for module in swapped(model).values()]
    dense_below = dense_below_of(model)
    notes = [kernel.advice(kernel.config, grids[-1]) for kernel in kernels if prod(grids[-1]) >= dense_below]
    if any(prod(grid) < dense_below for grid in grids):
        notes.append(f"converted stages with fewer than {dense_below:,} image tokens run the original attention")
    return tuple(dict.fromkeys(advice for advice in notes if advice is not None))


@contextmanager
def count_implementations(pipe_or_model: Any) -> Iterator[Counter[str]]:
    """Context manager that counts which implementations kernels run; original calls (`runs_original`) do not count."""
    counts: Counter[str] = Counter()

    def count(kernel: Any, inputs: tuple[Tensor, Tensor, Tensor, Layout], _options: Any) -> None:
        query, _, _, layout = inputs
        auto_impl = kernel.auto_impl(kernel.config, query, layout.grid, layout.text_len)
        counts[auto_impl if kernel.impl == "auto" else kernel.impl] += 1

    modules: list[Any] = [module.linear_kernel for module in swapped(denoiser(pipe_or_model)[1]).values()]
    handles = [kernel.register_forward_pre_hook(count, with_kwargs=True) for kernel in modules]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def describe_implementations(counts: Counter[str], model: nn.Module) -> str:
    """Counts of `count_implementations` over one forward, in words: "tiled", or how often each ran."""
    modules: list[Any] = list(swapped(model).values())
    swaps, dense_below = len(modules), dense_below_of(model)
    if original := swaps - counts.total():
        below_dense = sum(prod(module._lineardit_level.grid) < dense_below for module in modules) if dense_below else 0
        counts = counts + Counter({dense_below_text(dense_below): below_dense, COVERED: original - below_dense})
    return ", ".join(name if count == swaps else f"{count} x {name}" for name, count in counts.most_common())
