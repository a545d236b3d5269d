"""Run an unconverted pipeline on prompts and measure where its attention goes: what `lineardit profile` does."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from torch import nn
from tqdm import tqdm

from ... import __version__
from ..adapters.base import source_of
from ..calling import check_counts, draw_latents, original_call
from ..convert import restore_, swap_
from ..families import family_of
from ..matching import attention_modules, head_shape
from ..methods import METHODS, config_to_dict
from ..methods.clear import Clear
from ..networks import denoiser
from ..seam.conversion import Conversion
from ..weights.quantized import quantized_types
from .attention_profile import LayerProfile, Profile, is_window
from .probe import Probe

RADII = (4, 8, 16, 32)


def profile_attention(
    pipe: Any,
    prompts: Sequence[str],
    *,
    size: tuple[int, int],
    radii: Sequence[float] = RADII,
    methods: Sequence[Any] = (),
    steps: int = 8,
    queries: int = 64,
    seed: int = 0,
    guidance: float | None = None,
    max_sequence_length: int | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Profile:
    """Measure where the image's self-attention modules attend, and how much windows and methods change their output.

    Args:
        pipe: The original text-to-image pipeline, on the device to run on.
        prompts: One picture each.
        size: (height, width) of the pictures in pixels.
        radii: Radii of the windows in tokens, strict: distance < radius.
        methods: Configs of other methods to try in every layer, untrained and in the model's precision, such as
            `Mala()`; the radius of a window is added to the radii.
        steps: Denoising steps of each picture; all are measured.
        queries: Image queries sampled in each call of a layer, new ones in each.
        seed: Seed of the sample; noise of picture i comes from `torch.Generator("cpu").manual_seed(seed + i)`.
        guidance: `guidance_scale` of the pipeline; None: the pipeline's own.
        max_sequence_length: Text tokens; None: the pipeline's own.
        arguments: Further arguments of the pipeline's call, such as {"negative_prompt": "blurry"}.
    Raises:
        UnsupportedModelError: the model's class is not known.
        ValueError: a setting is out of range or not known to this pipeline, one of `methods` is not a config or cannot
            be tried layer by layer, or the pipeline is converted.
    """
    _, model = denoiser(pipe)
    for method in methods:
        _check_method(method)
    radii = tuple(sorted({*radii, *(method.radius for method in methods if is_window(method))}))
    methods = tuple(dict.fromkeys(method for method in methods if not is_window(method)))
    if not radii:
        raise ValueError("radii must hold at least one, got none")
    for radius in radii:
        Clear(radius=radius)  # raises if it is not a radius
    check_counts(prompts, {"queries": queries})
    call = original_call(
        pipe,
        prompts,
        size=size,
        steps=steps,
        guidance=guidance,
        max_sequence_length=max_sequence_length,
        arguments=arguments,
    )
    generator = torch.Generator("cpu").manual_seed(seed)
    with probed(model, radii, methods, num_queries=queries, generator=generator) as probes:
        for index, prompt in enumerate(tqdm(prompts, desc="profile", unit="picture")):
            draw_latents(pipe, prompt, seed + index, call)
    source = source_of(pipe, model)
    return Profile(
        base=source.name,
        revision=source.revision,
        model_class=type(model).__name__,
        size=size,
        radii=radii,
        methods=methods,
        prompts=len(prompts),
        steps=steps,
        queries=queries,
        seed=seed,
        quantized=quantized_types(model),
        layers=tuple(_layer(name, probes[name]) for name in sorted(probes, key=lambda name: probes[name].first_call)),
        versions={"lineardit": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__},
    )


@contextmanager
def probed(
    model: nn.Module,
    radii: Sequence[float],
    methods: Sequence[Any] = (),
    *,
    num_queries: int,
    generator: torch.Generator,
) -> Iterator[dict[str, Probe]]:
    """Context manager that runs a `Probe` in each self-attention module of the image; yields them by module name."""
    family = family_of(model)
    modules, _ = attention_modules(model, family)
    shared: dict[str, Any] = {"num_queries": num_queries, "generator": generator, "call_counter": itertools.count()}
    probes: dict[str, Probe] = {}
    for name, module in modules.items():
        num_heads, head_dim = head_shape(module)
        kernels = [METHODS[type(method)](method, num_heads=num_heads, head_dim=head_dim) for method in methods]
        probes[name] = Probe(radii, kernels, num_heads=num_heads, head_dim=head_dim, **shared)
    swap_(model, Conversion(family, {}), modules, probes)
    try:
        yield probes
    finally:
        restore_(model)


def _check_method(method: Any) -> None:
    """Raise a ValueError if this is not a config, or its method cannot be tried by its kernel alone."""
    config_to_dict(method)
    if METHODS[type(method)].input_terms:
        raise ValueError(f"{method} cannot be profiled layer by layer: it also changes the layers before attention")


def _layer(name: str, probe: Probe) -> LayerProfile:
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
    )
