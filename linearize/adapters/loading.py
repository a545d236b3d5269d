"""A linear pipeline in one call: the base that an adapter names, then the adapter."""

import logging
import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, cast

import diffusers
import torch
from torch import Tensor, nn

from ..convert import linearize_
from ..folders import read_tensors
from ..networks import denoiser
from ..seam.conversion import add_overlay
from ..weights.full_weights import FullWeights
from ..weights.low_rank import LORA_NAME, LowRank, match_layer
from .adapter import adapter_tensors, apply_adapter_
from .base import Base, build_on_meta
from .config_entry import is_conversion_tensor, suppress_loading_warnings, write_entry_
from .fitting import check_shapes, shapes_of
from .hub import log_if_slow
from .manifest import Entry, Manifest
from .outline import parts_on_meta
from .place import CONFIG_FILE, Place
from .quantization import Quantization, cast_layerwise_, quantization_options, translate_quantization_errors
from .resolve import ResolvedName, resolve_name
from .stored_weights import check_has_weights, files_of_denoiser, stored_dtype, stored_dtypes, variant_of

logger = logging.getLogger(__name__)

# Arguments of diffusers' `from_pretrained` that would unpickle or run code of a repository, or have other names here.
_SAFE = "weights are loaded from safetensors files only, and code from a repository is never run"
_REFUSED = dict.fromkeys(("use_safetensors", "trust_remote_code", "custom_pipeline"), _SAFE)
_REFUSED |= {"torch_dtype": "pass dtype instead", "local_files_only": "pass offline instead"}


def from_pretrained(
    directory_or_repo: str | Path,
    *,
    dtype: torch.dtype | Literal["auto"] | None = None,
    base: str | Path | None = None,
    revision: str | None = None,
    offline: bool = False,
    impl: str = "auto",
    keep_original: bool = True,
    weights: bool = True,
    **options: Any,
) -> Any:
    """Load the base that an adapter names, at the revision it names, and apply the adapter.

    A converted pipeline saved with plain `save_pretrained` is restored as well. Weights are read from safetensors
    files, never from pickles, and no code from a repository is run.

    Args:
        directory_or_repo: Folder, `.safetensors` file or Hub id of an adapter, or folder or Hub id of a saved converted
            pipeline, merged (`save_merged`) or not. Load an unconverted base with diffusers, and convert it with
            `linearize_`.
        dtype: Dtype of the weights; None: float32; "auto": the dtype in which the denoiser is stored.
        base: Folder or Hub id to load in place of the base that the adapter names, such as a moved copy or a fine-tune.
        revision: Branch, tag or commit of `directory_or_repo` on the Hub.
        offline: Do not access the network.
        impl: The implementation to run, as in `linearize_`.
        keep_original: As in `load_adapter_`.
        weights: False: build the pipeline on the meta device, in this dtype, for planning; only the config files of the
            base are read.
        options: Options of diffusers' `from_pretrained` for the base: `variant`, `quantization_config`, `device_map`,
            components to use in place of its own (`text_encoder=None`), and so on.
    Returns:
        The pipeline, on the CPU unless `device_map` is given; the denoiser if the adapter's base is a bare denoiser.
    Raises:
        ValueError: the adapter or its base is missing, unreachable or damaged, or they do not match; nothing is
            converted; an option would unpickle or run code; or `base` is given for something other than an adapter.
    """
    if not (dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype)):
        raise ValueError(f"dtype must be a torch.dtype, 'auto' or None, got {dtype!r}")
    resolved = resolve_name(directory_or_repo, base=base, revision=revision, offline=offline)
    return load_converted(resolved, dtype=dtype, impl=impl, keep_original=keep_original, weights=weights, **options)


def load_converted(
    resolved: ResolvedName,
    *,
    dtype: torch.dtype | Literal["auto", "stored"] | None,
    impl: str,
    keep_original: bool = True,
    weights: bool = True,
    **options: Any,
) -> Any:
    """`from_pretrained` for a name that has been resolved; `dtype` as in `load_base`."""
    place, conversion = resolved.place, resolved.require_conversion()
    load_options: dict[str, Any] = {"dtype": dtype, "offline": place.offline, "weights": weights, **options}
    if isinstance(conversion, Manifest):
        tensors = adapter_tensors(place, conversion, weights=weights)
        pipe = load_base(resolved.base, **load_options)
        apply_adapter_(pipe, conversion, tensors, keep_original=keep_original, impl=impl)
        return pipe
    if conversion.warning is None:
        logger.warning(
            "%s was written by save_pretrained: its conversion is restored, but plain diffusers loads it with full "
            "attention; use lineardit.save_adapter to save a student",
            place.name,
        )
    pipe = load_base(resolved.base, **load_options)
    _, model = denoiser(pipe)
    _restore_conversion_(model, conversion, impl, _denoiser_folder(model, place), weights)
    return pipe


def load_base(
    base: Base,
    *,
    dtype: torch.dtype | Literal["auto", "stored"] | None = None,
    offline: bool = False,
    weights: bool = True,
    quantization: Quantization | None = None,
    **options: Any,
) -> Any:
    """Load the pipeline of a base, or the bare denoiser; from safetensors files only.

    Args:
        base: From `read_base`.
        dtype: As in `from_pretrained`; "stored": every part in the dtype in which it is stored, to be written again.
        offline: Do not access the network.
        weights: As in `from_pretrained`.
        quantization: How to quantize the denoiser; with weights=False, only layerwise casting is applied.
        options: As in `from_pretrained`.
    Raises:
        ValueError: the base is a config without weights or has only pickles, it cannot be quantized like this, or an
            option is refused.
    """
    source = base.source
    for name, reason in _REFUSED.items():
        if name in options:
            raise ValueError(f"{name} is not supported: {reason}")
    if source.name is None or Path(source.name).is_file():
        raise ValueError(f"{source.name} is a config without weights: pass base= with a folder or Hub id that has them")
    files = files_of_denoiser(base, offline=offline) if weights else None
    if "variant" not in options:
        options["variant"] = None if files is None else variant_of(base, files)
    if files is not None and base.component not in options:
        check_has_weights(base, files, offline=offline)
    # None would leave text encoders in the dtype of their files
    load_dtype = dtype or torch.float32
    by_part: dict[str, torch.dtype] | None = None
    if isinstance(load_dtype, str):
        if load_dtype == "stored" and source.pipeline_class is not None:
            by_part = stored_dtypes(base, variant=options["variant"], offline=offline)
        load_dtype = stored_dtype(base, variant=options["variant"], offline=offline)
    if not weights and source.pipeline_class is None:
        model = build_on_meta(base, dtype=load_dtype)
        model.register_to_config(_name_or_path=source.name)  # type: ignore[operator]  # as diffusers does
        return model
    if not weights:
        options = parts_on_meta(base, dtype=load_dtype, offline=offline) | options
    elif quantization is not None:
        options |= quantization_options(quantization, base, load_dtype)
    loader = diffusers.DiffusionPipeline if source.pipeline_class else getattr(diffusers, base.model_class)
    slow_load = log_if_slow("loading %s", str(source.name))
    with warnings.catch_warnings(), translate_quantization_errors(quantization), suppress_loading_warnings(), slow_load:
        # new versions of diffusers call it dtype, which the oldest supported version would silently ignore
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
        pipe = loader.from_pretrained(
            source.name,
            torch_dtype=by_part or load_dtype,
            revision=source.revision,
            local_files_only=offline,
            use_safetensors=True,
            # diffusers requires components that were saved as None to be passed as None
            **dict.fromkeys(base.absent) | options,
        )
    cast_layerwise_(denoiser(pipe)[1], quantization, load_dtype)
    return pipe


def _denoiser_folder(model: Any, place: Place) -> Path:
    """The folder of the denoiser's files; of a bare denoiser on the Hub, diffusers records only the id."""
    folder = Path(model.config._name_or_path)
    if place.folder is None and not folder.is_dir():
        config = place.file(CONFIG_FILE)
        assert config is not None  # it was read before
        return config.parent
    return folder


def _restore_conversion_(model: Any, entry: Entry, impl: str, folder: Path, weights: bool) -> None:
    """Restore kernels, their parameters, LoRA, and the record of base weights that were overwritten."""
    without_weights = not weights and not any(folder.glob("*.safetensors"))
    dense_below = entry.dense_tokens if without_weights else entry.dense_below
    linearize_(model, entry.configs(), dense_below=dense_below, impl=impl)
    parameters = dict(model.named_parameters())
    changed = [name for name in parameters if any(fnmatchcase(name, glob) for glob in entry.changed)]
    if changed:
        add_overlay(model, FullWeights(model, dict.fromkeys(changed)))
    if without_weights:  # only a repository's configs were fetched
        return
    saved = _conversion_tensors(folder)
    for trained in entry.trained:
        if trained.kind == "lora":
            add_overlay(model, _saved_lora(model, saved, cast(float, trained.alpha), folder))
    expected = {name: one for name, one in model.state_dict().items() if _is_loaded_with_conversion(name)}
    check_shapes(shapes_of(saved), shapes_of(expected), what=f"the tensors of {folder}")
    model.load_state_dict(saved, strict=False)
    write_entry_(model)


def _saved_lora(model: nn.Module, saved: Mapping[str, Tensor], alpha: float, folder: Path) -> LowRank:
    suffix = f".{LORA_NAME}.down"
    layers = [name.removesuffix(suffix) for name in saved if name.endswith(suffix)]
    if not layers:
        raise ValueError(f"{folder} is missing the LoRA that its config.json refers to: copy it again")
    pairs = {layer: (saved[f"{layer}{suffix}"], saved[f"{layer}.{LORA_NAME}.up"]) for layer in layers}
    return LowRank(model, {layer: match_layer(model, layer, pair) for layer, pair in pairs.items()}, alpha=alpha)


def _conversion_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved denoiser that belong to the conversion and not to the base."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= read_tensors(file, only=_is_loaded_with_conversion)
    return tensors


def _is_loaded_with_conversion(name: str) -> bool:
    """As `is_conversion_tensor`; a ValueError if the tensor is under a user's peft layer."""
    if ".base_layer." in name:
        raise ValueError(
            "this model was saved with an additional LoRA loaded: unload that LoRA and save the model again"
        )
    return is_conversion_tensor(name)
