"""`--lora`: LoRAs on top of a converted model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Lora:
    """A LoRA (safetensors file, folder or Hub id) and its weight."""

    source: str
    weight: float

    def __str__(self) -> str:
        return f"{self.source}:{self.weight:g}"


def parse_loras(texts: Sequence[str] | None) -> list[Lora]:
    """Parse texts FILE[:WEIGHT].

    Raises:
        ValueError: the file does not exist, or is not safetensors.
    """
    loras = []
    for text in texts or ():
        source, weight = _parts(text)
        loras.append(Lora(source, weight))
        path = Path(source)
        if not path.exists() and (path.suffix == ".safetensors" or path.is_absolute()):
            raise ValueError(f"--lora: {path} does not exist")
        if path.is_file() and path.suffix != ".safetensors":
            raise ValueError(f"--lora must be FILE[:WEIGHT], a file that ends in .safetensors, got {text!r}")
    return loras


def _parts(text: str) -> tuple[str, float]:
    source, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", weight) is None:
        raise ValueError(f"--lora must be FILE[:WEIGHT], the weight a number such as 0.8, got {text!r}")
    return source, float(weight)


def load_loras_(pipe: Any, loras: Sequence[Lora], *, offline: bool) -> None:
    """Add LoRAs to a pipeline with its own `load_lora_weights`.

    Raises:
        ValueError: the pipeline takes none, or one is for another model.
    """
    if not loras:
        return
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"a {type(pipe).__name__} does not support LoRA: leave --lora out")
    names = [f"lora_{number}" for number in range(1, len(loras) + 1)]
    for name, lora in zip(names, loras, strict=True):
        pipe.load_lora_weights(lora.source, adapter_name=name, local_files_only=offline, use_safetensors=True)
        if name not in {one for part in pipe.get_list_adapters().values() for one in part}:
            raise ValueError(f"--lora {lora.source} is for another model than this {type(pipe).__name__}")
    pipe.set_adapters(names, [lora.weight for lora in loras])
