"""Golden files: inputs and outputs of published code (golden/README.md)."""

from pathlib import Path

from safetensors import safe_open
from torch import Tensor


def golden_parts(name: str) -> tuple[dict[str, str], dict[str, dict[str, Tensor]]]:
    """The metadata of a file, and {part: {rest of the name: tensor}}."""
    parts: dict[str, dict[str, Tensor]] = {}
    with safe_open(Path(__file__).parent / "golden" / f"{name}.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            part, _, rest = key.partition(".")
            parts.setdefault(part, {})[rest] = file.get_tensor(key)
        return file.metadata(), parts


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.std())
