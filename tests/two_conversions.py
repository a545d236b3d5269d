"""Two adapters of one base, for commands that compare conversions."""

from pathlib import Path

from lineardit.cli import run


def convert_twice(folder: Path) -> None:
    """`clear-1.5` and `clear-3` beside the `base` in a folder."""
    for radius in (1.5, 3):
        words = ["convert", folder / "base", "--method", "clear", "--radius", radius, "--offline"]
        assert run([*map(str, words), "-o", str(folder / f"clear-{radius}")]) == 0
