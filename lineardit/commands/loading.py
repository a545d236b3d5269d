"""Loading the pipeline that a command asks for, onto its device."""

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
    """The pipeline on its device, and what its pictures record of it; without weights, only its structure."""
    from .. import __version__
    from ..kernels.pieces.results import dtype_name
    from ..linearize.adapters.adapter import find_adapter
    from ..linearize.adapters.base import source_of
    from ..linearize.adapters.opening import open_pipeline
    from ..linearize.describe import swap_report
    from ..linearize.folders import sha256
    from ..linearize.networks import denoiser
    from ..pipelines.placement import check_offload, place_, record_placement_
    from .devices import find_device, find_dtype
    from .loras import load_loras_

    target = find_device(device)
    weights = find_dtype(dtype, target)
    check_offload(target, offload, quantization)
    open_arguments: dict[str, Any] = {"base": base, "revision": revision, "offline": offline, "impl": impl}
    open_arguments |= {"dtype": weights, "quantization": quantization, "weights": with_weights}
    pipe = open_pipeline(source, **open_arguments)
    load_loras_(pipe, loras, offline=offline)
    if with_weights:
        place_(pipe, target, offload)
    else:
        record_placement_(pipe, target, offload, quantization)
    if swap_report(pipe) is None:  # otherwise the conversion has logged what it swapped
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


def open_on_device(name: str, *, device: "torch.device", offload: str, **open_arguments: Any) -> Any:
    """Open a pipeline and place it on its device; an impossible placement raises before anything is loaded."""
    from ..linearize.adapters.opening import open_pipeline
    from ..pipelines.placement import check_offload, place_

    check_offload(device, offload, open_arguments.get("quantization"))
    pipe = open_pipeline(name, **open_arguments)
    place_(pipe, device, offload)
    return pipe


def load_at_size(
    base: str, size: tuple[int, int] | None, *, device: "torch.device", offload: str, **open_arguments: Any
) -> tuple[Any, tuple[int, int]]:
    """An unconverted pipeline on its device, and the (height, width) asked for, or its default."""
    from ..pipelines.sizes import check_size, default_size

    pipe = open_on_device(base, device=device, offload=offload, **open_arguments)
    height, width = size or default_size(pipe)
    check_size(pipe, height, width)
    return pipe, (height, width)


def recorded_base(adapter: str, model: str | None, revision: str | None, offline: bool) -> str | None:
    """The base that a picture records, if its adapter names another; else None."""
    from ..linearize.adapters.adapter import find_adapter
    from ..linearize.adapters.manifest import read_manifest

    file = find_adapter(adapter, revision=revision, offline=offline)
    if file is None or model is None or read_manifest(file).base == model:
        return None
    print(f"using the base {model}, as recorded in the picture")
    return model
