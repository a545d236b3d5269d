"""A student as a plain diffusers folder: the whole pipeline, with trained weights merged."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..convert import converted_networks
from ..folders import new_folder
from ..networks import denoiser
from ..seam.conversion import overlays_of
from ..weights.full_weights import check_writable
from ..weights.low_rank import LORA_NAME, LowRank
from ..weights.overlays import refuse_fused
from .adapter import manifest_of
from .base import source_of
from .config_entry import CONFIG_KEY, entry_of, write_entry_
from .manifest import Manifest
from .model_card import CARD_FILE, merged_card, merged_warning


def save_merged(pipe_or_model: Any, directory: str | Path, *, overwrite: bool = False) -> Path:
    """Write the whole pipeline with trained weights merged; the pipeline in memory is unchanged.

    Load the folder with `lineardit.from_pretrained`, which converts it. Plain diffusers would load it with full
    attention, for which these weights were not trained; config.json and the model card (README.md) warn about it.

    Args:
        pipe_or_model: A pipeline or denoiser after `linearize_`.
        directory: The folder to write, atomically.
        overwrite: Replace an existing folder.
    Returns:
        The folder.
    Raises:
        ValueError: nothing is converted, the folder exists, a LoRA of your own is loaded, or weights are
            quantized or not in memory.
    """
    _, model = denoiser(pipe_or_model)
    _check_mergeable(model)
    folder = Path(directory)
    manifest = manifest_of(model, source_of(pipe_or_model, model))
    saved: Any = model if isinstance(pipe_or_model, nn.Module) else pipe_or_model
    with new_folder(folder, overwrite=overwrite) as temporary, _merged(model, manifest):
        saved.save_pretrained(temporary)
        (temporary / CARD_FILE).write_text(merged_card(manifest, folder.name), encoding="utf-8")
    return folder


def _check_mergeable(model: nn.Module) -> None:
    if not converted_networks(model)[model].enabled:
        raise ValueError("the trained weights are disabled inside `with dense(model):`: save outside it")
    refuse_fused(model)
    for name, module in model.named_modules():
        if hasattr(module, "get_base_layer"):
            raise ValueError(f"{name} has an additional LoRA loaded, which is not part of the student: unload it first")
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(f"{missing[0]} is not in memory (sequential offload?): save before enabling offload")
    check_writable(model, _merged_names(model))


def _merged_names(model: nn.Module) -> list[str]:
    """Names of the base's parameters whose values differ in the merged folder."""
    names: list[str] = []
    for overlay in overlays_of(model).items:
        names += [f"{layer}.weight" for layer in overlay.layers] if isinstance(overlay, LowRank) else overlay.changed()
    return names


@contextmanager
def _merged(model: Any, manifest: Manifest) -> Iterator[None]:
    """Context manager in which the model's state dict and config are those of the merged model."""
    entry = replace(entry_of(model, changed=_merged_names(model)), warning=merged_warning(manifest), trained=())
    handle = model.register_state_dict_post_hook(_merge_lora)
    model.register_to_config(**{CONFIG_KEY: entry.to_dict()})
    try:
        yield
    finally:
        handle.remove()
        write_entry_(model)


def _merge_lora(model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """State dict hook that merges LoRA into the weights of its layers."""
    for overlay in overlays_of(model).items:
        if isinstance(overlay, LowRank):
            state_dict.update({prefix + name: weight for name, weight in overlay.merged_weights().items()})
    for name in [name for name in state_dict if f".{LORA_NAME}." in name]:
        del state_dict[name]
