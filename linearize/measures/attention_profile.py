"""Where a model's attention goes, layer by layer and head by head: the contents of `profile.json`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..adapters.base import read_json
from ..folders import write_atomically
from ..methods import config_from_dict, config_to_dict
from ..methods.clear import Clear
from ..methods.field_checks import as_tuples

FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """One self-attention module of the image; every figure is a mean over image queries, prompts and steps.

    Attributes:
        module: Its name.
        grid: Size of the image in tokens, at the profiled size.
        text_len: Number of other tokens.
        head_dim: Channels of a head.
        mass: For each head and radius, the attention on image tokens nearer than that, the query's own included.
        text: For each head, the attention on text.
        distance: For each head, the mean distance in tokens to image tokens, weighted by attention.
        output_error: For each of the profile's candidates, |out_c - out|^2 / |out|^2 of the attention's output.
    """

    module: str
    grid: tuple[int, ...]
    text_len: int
    head_dim: int
    mass: tuple[tuple[float, ...], ...]
    text: tuple[float, ...]
    distance: tuple[float, ...]
    output_error: tuple[float, ...]

    @property
    def num_heads(self) -> int:
        return len(self.mass)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A profiled model.

    Attributes:
        base: Hub id or folder.
        revision: Commit of a Hub id.
        model_class: Class of the denoiser.
        size: (height, width) of the pictures in pixels.
        radii: Radii of the windows in tokens, ascending; strict: distance < radius.
        methods: Configs of the other methods tried in every layer, untrained.
        prompts: Number of prompts.
        steps: Denoising steps of each picture.
        queries: Image queries sampled in each call of a layer.
        seed: Seed of the noise and of the sampled queries.
        quantized: Its backend's name for the type of quantized weights; None: no weights are quantized.
        layers: In the order of the forward.
        versions: Versions of lineardit, diffusers and torch.
    """

    base: str | None
    revision: str | None
    model_class: str
    size: tuple[int, int]
    radii: tuple[float, ...]
    methods: tuple[Any, ...] = ()
    prompts: int
    steps: int
    queries: int
    seed: int
    quantized: str | None = None
    layers: tuple[LayerProfile, ...]
    versions: Mapping[str, str]

    @property
    def windows(self) -> tuple[Clear, ...]:
        """The windows of these radii, as configs."""
        return tuple(Clear(radius=radius) for radius in self.radii)

    @property
    def candidates(self) -> tuple[Any, ...]:
        """The configs of each layer's `output_error`: the windows, then the methods."""
        return (*self.windows, *self.methods)

    def write(self, path: Path) -> None:
        """Write JSON atomically."""
        methods = [config_to_dict(method) for method in self.methods]
        text = json.dumps({"format": FORMAT, **asdict(self), "methods": methods}, indent=1) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def is_window(config: Any) -> bool:
    """Whether a config is a window with a radius and no other setting, as in `Profile.radii`."""
    return type(config) is Clear and config == Clear(radius=config.radius)


def read_profile(path: str | Path) -> Profile:
    """Read what `Profile.write` wrote.

    Raises:
        ValueError: the file is missing, damaged or of another format, or a method in it is unknown.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no profile {path}: make one with `lineardit profile`")
    entries = {"quantized": None} | read_json(path)
    if entries.pop("format", None) != FORMAT or set(entries) != {field.name for field in fields(Profile)}:
        raise ValueError(f"{path} is not a profile of format {FORMAT}: make it with this version's `lineardit profile`")
    try:
        layers = tuple(
            LayerProfile(**{name: as_tuples(value) for name, value in layer.items()}) for layer in entries.pop("layers")
        )
        methods = tuple(map(config_from_dict, entries.pop("methods")))
    except TypeError as error:
        raise ValueError(f"{path} is damaged ({error}): make it again with `lineardit profile`") from error
    return Profile(layers=layers, methods=methods, **{name: as_tuples(value) for name, value in entries.items()})
