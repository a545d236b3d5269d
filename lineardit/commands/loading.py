"""The pipeline that a command asks for, in its place."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..linearize.adapters.quantization import Quantization
    from .loras import Lora


def load(
    source: str,
    *,
    base: str | None,
    revision: str | None,
    offline: bool,
    impl: str,
    device: str,
    dtype: str,
    offload: str,
    quantization: "Quantization | None" = None,
    loras: "Sequence[Lora]" = (),
    with_weights: bool = True,
) -> tuple[Any, dict[str, str]]:
    """The pipeline in its place, and what its pictures say of it; without weights, in its shape, for a plan."""
    from .. import __version__
    from ..kernels.pieces.results import dtype_name
    from ..linearize.adapters.adapter import find_adapter
    from ..linearize.adapters.base import source_of
    from ..linearize.adapters.opening import open_pipeline
    from ..linearize.folders import sha256
    from ..linearize.networks import denoiser
    from ..linearize.what_runs import swap_report
    from ..pipelines.placement import check_offload, note_place_, place_
    from .devices import find_device, find_dtype
    from .loras import load_loras_

    target = find_device(device)
    weights = find_dtype(dtype, target)
    check_offload(target, offload, quantization)
    opening: dict[str, Any] = {"base": base, "revision": revision, "offline": offline, "impl": impl}
    opening |= {"dtype": weights, "quantization": quantization, "weights": with_weights}
    pipe = open_pipeline(source, **opening)
    load_loras_(pipe, loras, offline=offline)
    if with_weights:
        place_(pipe, target, offload)
    else:
        note_place_(pipe, target, offload, quantization)
    if swap_report(pipe) is None:  # else the conversion has said what it swapped
        print(f"{source} runs with its original attention")
    model = source_of(pipe, denoiser(pipe)[1]).name or source
    about = {"model": model, "dtype": dtype_name(weights), "lineardit": __version__}
    if quantization is not None:
        about["quantize"] = str(quantization)
    if loras:
        about["lora"] = ", ".join(map(str, loras))
    manifest = find_adapter(source, revision=revision, offline=offline)
    if manifest is not None:
        about |= {"adapter": source, "adapter_sha256": sha256(manifest)}
    return pipe, about


def open_in_place(name: str, *, device: "torch.device", offload: str, **opening: Any) -> Any:
    """What `open_pipeline` opens, in its place; a place that it cannot have is told before it is loaded."""
    from ..linearize.adapters.opening import open_pipeline
    from ..pipelines.placement import check_offload, place_

    check_offload(device, offload, opening.get("quantization"))
    pipe = open_pipeline(name, **opening)
    place_(pipe, device, offload)
    return pipe


def load_at_size(
    base: str, size: tuple[int, int] | None, *, device: "torch.device", offload: str, **opening: Any
) -> tuple[Any, tuple[int, int]]:
    """An unconverted pipeline in its place, and the (height, width) that it is asked for, or its own."""
    from ..pipelines.sizes import check_size, default_size

    pipe = open_in_place(base, device=device, offload=offload, **opening)
    height, width = size or default_size(pipe)
    check_size(pipe, height, width)
    return pipe, (height, width)


def base_said(adapter: str, model: str | None, revision: str | None, offline: bool) -> str | None:
    """The base that a picture says it is of, where that is another than its adapter names; else None."""
    from ..linearize.adapters.adapter import find_adapter
    from ..linearize.adapters.manifest import read_manifest

    file = find_adapter(adapter, revision=revision, offline=offline)
    if file is None or model is None or read_manifest(file).base == model:
        return None
    print(f"using the base {model}, as recorded in the picture")
    return model
