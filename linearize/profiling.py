"""Run an unconverted pipeline on prompts and measure where its attention goes: what `lineardit profile` does.

Two things are measured while it denoises. Every call of a layer notes where a sample of its queries looks (`probe.py`).
And in some steps the forward runs once more for each layer and radius, with that layer alone in that window: how much
the prediction changes is the damage that a budget is spent by.
"""

import inspect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import __version__
from .attention_profile import LayerProfile, Profile
from .base import source_of
from .convert import denoiser, restore_, swap_
from .families import family_of
from .matching import attention_modules, head_shape
from .methods.clear import Clear
from .probe import Probe
from .seam import State, state_of

RADII = (4, 8, 16, 32)


def profile_attention(
    pipe: Any,
    prompts: Sequence[str],
    *,
    size: tuple[int, int],
    radii: Sequence[float] = RADII,
    steps: int = 8,
    compared: int = 2,
    queries: int = 64,
    seed: int = 0,
    guidance: float | None = None,
    max_sequence_length: int | None = None,
) -> Profile:
    """Where each self-attention module of the image looks, and what a window in it alone does to the prediction.

    Args:
        pipe: The original text-to-image pipeline, on the device where it shall run.
        prompts: One picture each.
        size: (height, width) of the pictures in pixels.
        radii: Of the windows, in tokens, strict: distance < radius.
        steps: Denoising steps of each picture; every one is looked at.
        compared: Of these, how many run once more for each layer and radius: layers x radii forwards each.
        queries: Image queries that each call of a layer is looked at for, drawn anew each time.
        seed: Of the queries; and noise of picture i comes from `torch.Generator("cpu").manual_seed(seed + i)`.
        guidance: `guidance_scale` of the pipeline; None: the pipeline's own.
        max_sequence_length: Text tokens; None: the pipeline's own.
    Raises:
        UnsupportedModelError: the model's class is not known.
        ValueError: a setting is out of range or not known to this pipeline, or the pipeline is converted.
    """
    _, model = denoiser(pipe)
    radii = tuple(sorted(set(radii)))
    _check(model, prompts, radii, {"steps": steps, "compared": compared, "queries": queries})
    settings = {"height": size[0], "width": size[1], "num_inference_steps": steps}
    settings |= {"guidance_scale": guidance, "max_sequence_length": max_sequence_length}
    call = _call(pipe, {name: value for name, value in settings.items() if value is not None})
    generator = torch.Generator("cpu").manual_seed(seed)
    pipe.set_progress_bar_config(disable=True)
    with probed(model, radii, num_queries=queries, generator=generator) as probes:
        total = len(prompts) * (steps + compared * len(probes) * len(radii))
        with tqdm(total=total, desc="profile", unit="forward") as progress:
            watch = _Watch(model, probes, radii, stride=math.ceil(steps / compared), progress=progress)
            for index, prompt in enumerate(prompts):
                noise = torch.Generator("cpu").manual_seed(seed + index)
                with watch.picture():
                    pipe(prompt, generator=noise, output_type="latent", **call)
                progress.total = progress.n * len(prompts) // (index + 1)  # some call the model twice a step
    source = source_of(pipe, model)
    return Profile(
        base=source.name,
        revision=source.revision,
        model_class=type(model).__name__,
        size=size,
        radii=radii,
        prompts=len(prompts),
        steps=steps,
        compared=compared,
        queries=queries,
        seed=seed,
        layers=watch.layers(),
        versions={"lineardit": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__},
    )


@contextmanager
def probed(
    model: nn.Module, radii: Sequence[float], *, num_queries: int, generator: torch.Generator
) -> Iterator[dict[str, Probe]]:
    """Inside, each self-attention module of the image runs a `Probe`; yields them by module name."""
    family = family_of(model)
    modules, _ = attention_modules(model, family)
    turns = itertools.count()
    shared: dict[str, Any] = {"num_queries": num_queries, "generator": generator, "turns": turns}
    probes: dict[str, Probe] = {}
    for name, module in modules.items():
        num_heads, head_dim = head_shape(module)
        probes[name] = Probe(radii, num_heads=num_heads, head_dim=head_dim, **shared)
    swap_(model, State(family, {}), modules, probes)
    try:
        yield probes
    finally:
        restore_(model)


class _Watch:
    """Looks at the forwards of a probed model, and repeats some of them with one layer changed."""

    def __init__(
        self, model: nn.Module, probes: Mapping[str, Probe], radii: Sequence[float], *, stride: int, progress: Any
    ) -> None:
        self.model = model
        self.probes = probes
        self.radii = radii
        self.stride = stride
        self.progress = progress
        self.errors: dict[str, list[float]] = {name: [0.0] * len(radii) for name in probes}
        self.repeated = 0
        self.calls = 0  # in this picture
        self.repeating = False

    @contextmanager
    def picture(self) -> Iterator[None]:
        """Inside, the pipeline makes one picture."""
        self.calls = 0
        _note(self.probes, True)
        handle = self.model.register_forward_hook(self._after, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.progress.update()
        if self.repeating:
            return
        if self.calls % self.stride == self.stride // 2:
            self.repeating = True
            _note(self.probes, False)
            self._repeat(args, kwargs, list(_tensors(output)))
            _note(self.probes, True)
            self.repeating = False
        self.calls += 1

    def _repeat(self, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: list[Tensor]) -> None:
        norm = sum(_square(tensor) for tensor in wanted)
        for name, probe in self.probes.items():
            for index, probe.window in enumerate(self.radii):
                found = _tensors(self.model(*args, **kwargs))
                self.errors[name][index] += sum(_square(a - b) for a, b in zip(found, wanted, strict=True)) / norm
            probe.window = None
        self.repeated += 1

    def layers(self) -> tuple[LayerProfile, ...]:
        """What was measured, in the order of the forward."""
        return tuple(
            _layer(name, self.probes[name], [error / self.repeated for error in self.errors[name]])
            for name in sorted(self.probes, key=lambda name: self.probes[name].turn)
        )


def _note(probes: Mapping[str, Probe], noting: bool) -> None:
    for probe in probes.values():
        probe.noting = noting


def _layer(name: str, probe: Probe, damage: Sequence[float]) -> LayerProfile:
    sums = probe.sums
    in_image = sums.queries - sums.text
    return LayerProfile(
        module=name,
        grid=tuple(probe.grid),
        text_len=probe.text_len,
        head_dim=probe.head_dim,
        mass=tuple(map(tuple, (sums.mass / sums.queries).tolist())),
        text=tuple((sums.text / sums.queries).tolist()),
        distance=tuple((sums.distance / in_image).tolist()),
        output_error=tuple((sums.error / sums.norm).tolist()),
        damage=tuple(damage),
    )


def _tensors(output: Any) -> Iterator[Tensor]:
    """What a forward returned: a tensor, several, or diffusers' output with names."""
    if isinstance(output, Tensor):
        yield output
    elif output is not None:
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


def _square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


def _call(pipe: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, all of which the pipeline must know."""
    known = inspect.signature(pipe.__call__).parameters
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"{type(pipe).__name__} takes no {name}: leave it out, got {value}")
    return dict(settings)


def _check(model: nn.Module, prompts: Sequence[str], radii: Sequence[float], counts: Mapping[str, int]) -> None:
    if state_of(model) is not None:
        raise ValueError("pipe must be the original pipeline, got a converted one; call restore_ first")
    if not prompts or not radii:
        raise ValueError(f"prompts and radii must not be empty, got {len(prompts)} and {len(radii)}")
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if counts["compared"] > counts["steps"]:
        raise ValueError(f"compared must be <= steps, got {counts['compared']} > {counts['steps']}")
    for radius in radii:
        Clear(radius=radius)  # raises where it is no radius
