"""Two adapters of one base, for commands that compare conversions."""

from pathlib import Path

from typed import lineardit


def convert_twice(folder: Path) -> None:
    """Write `clear-1.5` and `clear-3` next to the `base` in a folder."""
    for radius in (1.5, 3):
        options = ("--method", "clear", "--radius", radius, "--offline", "-o", folder / f"clear-{radius}")
        assert lineardit("convert", folder / "base", *options) == 0
