"""How near each method is to the small trained model without training, by single predictions: `make nearness`, minutes.

For the steps of a few held-out captions: the relative error of one prediction (linearize/measures/nearness.py), and the
method's cost there and at FLUX.1's 4K shape. Writes benchmarks/results/nearness.json, nearness.md and nearness.png.
"""

import argparse
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import flux_layer
from flux_layer import flops, title
from matplotlib.figure import Figure

from lineardit.commands.quiet import quiet_libraries
from lineardit.distill.files import write_json
from lineardit.examples.tiny_flux import path, scenes
from lineardit.kernels.focus import cells_in_focus
from lineardit.linearize.adapters.opening import open_pipeline
from lineardit.linearize.convert import linearize_, restore_
from lineardit.linearize.folders import write_atomically
from lineardit.linearize.measures.nearness import nearness, record_predictions
from lineardit.linearize.methods import (
    METHODS,
    Agent,
    Clear,
    Hybrid,
    Mala,
    Neighborhood,
    ProxyTokens,
    Rala,
    SlidingTile,
)

RESULTS = Path(__file__).with_name("results")
SIDE, TEXT_LEN, STEPS = 128, 64, 8
GRID, SHAPE = (32, 32), {"num_heads": 4, "head_dim": 32}  # of the small model at this size


def hybrid(proxies: int, focus: int = 0, side: int = 4) -> Hybrid:
    proxy_tokens = ProxyTokens(num_proxies=proxies)
    return Hybrid(local=Clear(radius=4), global_=proxy_tokens, gate=1.0, focus_tokens=focus, focus_side=side)


ROWS: dict[str, tuple[Any, ...]] = {  # by kind; each has a colour in the plot
    "window": (
        *(Clear(radius=radius) for radius in (4, 6, 8, 10, 12, 14, 17, 20)),
        Neighborhood(window=7),
        SlidingTile(tile=4, window=3),
    ),
    "window and pooled tokens": tuple(Clear(radius=4, pool_tokens=count) for count in (64, 256)),
    "hybrid of proxies": (hybrid(64), hybrid(256)),
    "hybrid of proxies and focus": (
        *(hybrid(256, tokens) for tokens in (64, 128, 256)),
        *(hybrid(256, tokens, 8) for tokens in (128, 256)),
        hybrid(256, 128, 2),
        hybrid(64, 128),
    ),
    "hybrid of another kind": tuple(
        Hybrid(local=Clear(radius=4), global_=one, gate=1.0) for one in (Agent(num_agents=64), Mala())
    ),
    "no window": (Agent(num_agents=64), Mala(), Rala(), ProxyTokens(num_proxies=64), ProxyTokens(num_proxies=256)),
}
QUICK: dict[str, tuple[Any, ...]] = {"window": (Clear(radius=4),), "no window": (Mala(),)}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method.

    Attributes:
        keys: Mean number of keys that an image token attends to, text included.
        flux_gflops: GFLOPs of one layer at FLUX.1's 4K shape; None if it has nothing in focus there.
        errors: By step.
    """

    name: str
    kind: str
    keys: float
    flux_gflops: float | None
    errors: tuple[float, ...]
    mean: float


def measure(rows: Mapping[str, Sequence[Any]], captions: int, steps: int) -> list[Row]:
    """A row per method; the base is first, with an error of 0."""
    pipe = open_pipeline(path())
    prompts = [scenes.sample(index, split="held_out").caption for index in range(captions)]
    settings: dict[str, Any] = {"size": (SIDE, SIDE), "steps": steps, "max_sequence_length": TEXT_LEN}
    predictions = record_predictions(pipe, prompts, **settings)
    made = []
    for kind, methods in {"the model itself": (None,), **rows}.items():
        for method in methods:
            if method is not None:
                linearize_(pipe, method)
            name = "softmax over everything" if method is None else title(method)
            found = nearness(pipe, predictions, name=name)
            made.append(
                Row(
                    name=name,
                    kind=kind,
                    keys=keys_per_token(method),
                    flux_gflops=flux_gflops(method),
                    errors=found.errors,
                    mean=found.mean,
                )
            )
            if method is not None:
                restore_(pipe)
    return made


def flux_gflops(method: Any) -> float | None:
    """GFLOPs of one layer; None if cells are so large there that none is in focus, which makes it another method."""
    focused = isinstance(method, Hybrid) and method.focus_tokens > 0
    if focused and cells_in_focus(method.focus_tokens, method.num_cells, flux_layer.GRID) == 0:
        return None
    return flops(method) / 1e9


def keys_per_token(method: Any) -> float:
    """Mean number of keys of an image token, without text queries."""
    tokens = math.prod(GRID)
    if method is None:
        return TEXT_LEN + tokens
    pairs = METHODS[type(method)].pairs(method, GRID, TEXT_LEN, **SHAPE)
    return (pairs - TEXT_LEN * (TEXT_LEN + tokens)) / tokens


def as_markdown(about: str, rows: Sequence[Row]) -> str:
    lines = [
        "# How near a method is without training",
        "",
        about,
        "",
        "| method | keys a token, here | GFLOP a layer, FLUX.1 at 4K | error, mean | first step | last step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        errors = " | ".join(f"{error:.2g}" for error in (row.mean, row.errors[0], row.errors[-1]))
        flux = "nothing in focus" if row.flux_gflops is None else f"{row.flux_gflops:.0f}"
        lines.append(f"| `{row.name}` | {row.keys:.0f} | {flux} | {errors} |")
    return "\n".join([*lines, "", "![error against cost](nearness.png)", ""])


LABELS = {
    "radius": "radius {}",
    "window": "window {}",
    "pool_tokens": "{} pooled",
    "num_agents": "{} agents",
    "num_proxies": "{} proxies",
    "focus_tokens": "{} in focus",
    "focus_side": "{0} x {0}",
}


def label(row: Row) -> str:
    """A row's settings in words; for a hybrid, without those of the window, which all share."""
    settings = row.name.removeprefix("Hybrid(local=Clear(radius=4), global_=")
    words = [LABELS[name].format(value) for name, value in re.findall(r"(\w+)=([\d.]+)", settings) if name in LABELS]
    return ", ".join(words) or settings.split("(")[0]


def draw(rows: Sequence[Row], picture: Path) -> None:
    """Plot error against keys per token on log scales, a colour for each kind."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    full_attention, *others = rows
    for kind in dict.fromkeys(row.kind for row in others):
        rows_of_kind = [row for row in others if row.kind == kind]
        axes.plot(
            [row.keys for row in rows_of_kind],
            [row.mean for row in rows_of_kind],
            linestyle="none",
            marker="o",
            label=kind,
        )
        for row in rows_of_kind:
            axes.annotate(label(row), (row.keys, row.mean), fontsize=6, xytext=(4, 4), textcoords="offset points")
    axes.axvline(full_attention.keys, color="black", linewidth=0.8, linestyle="--", label="softmax over everything")
    axes.set(xscale="log", yscale="log", xlabel="keys a token", ylabel="relative error of one prediction, untrained")
    axes.set_xlim(right=1.4 * full_attention.keys)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7, loc="lower left")
    write_atomically(picture, lambda temporary: figure.savefig(temporary, format="png", dpi=130))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--captions", type=int, default=4)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="two methods, two steps, one caption: does it run?")
    options = parser.parse_args()
    quiet_libraries()
    logging.basicConfig(level=logging.WARNING)
    captions, steps = (1, 2) if options.quick else (options.captions, STEPS)
    rows = measure(QUICK if options.quick else ROWS, captions, steps)
    options.results.mkdir(parents=True, exist_ok=True)
    about = (
        f"examples/tiny_flux, {captions} held-out captions at {SIDE}x{SIDE}, {steps} denoising steps: "
        "|converted - original|^2 over |original|^2 of single predictions, on the original's way to its picture."
    )
    write_json(options.results / "nearness.json", {"about": about, "rows": [asdict(row) for row in rows]})
    report = as_markdown(about, rows)
    write_atomically(options.results / "nearness.md", lambda temporary: temporary.write_text(report))
    draw(rows, options.results / "nearness.png")
    print(report)


if __name__ == "__main__":
    main()
