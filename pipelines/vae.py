"""Encoding and decoding pictures of any size in the memory of one tile.

Tiles of one size are spaced evenly over the picture and overlap by at least a quarter, where they are blended linearly.
Only the blended sum, in float32 on the CPU, grows with the picture. The VAE's attention sees one tile only, so that
memory is bounded by the tile; group norms use the statistics of the whole picture, from a run on it downsampled to a
tile (`group_statistics.py`).
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from ..linearize.errors import why_too_large
from .group_statistics import whole_statistics

logger = logging.getLogger(__name__)

OVERLAP = 0.25  # of a tile, at least
SDXL_SCALING = 0.13025  # of the only VAE that overflows in float16; other configs have force_upcast by default
_SUPPORTED = ("AutoencoderKL", "AutoencoderKLQwenImage", "AutoencoderKLFlux2", "AutoencoderKLHunyuanImage")
SMALLEST_TILE = 256  # pixels; below it, a tile is mostly border


def decode(vae: Any, latents: Tensor, *, tile: int | None, progress: bool = False) -> Tensor:
    """Decode latents to pictures, in smaller tiles if memory runs out or a tensor is too large for CUDA's kernels.

    Args:
        vae: An `AutoencoderKL` of diffusers, or Qwen-Image's (of videos), FLUX.2's, HunyuanImage's.
        latents: [B, C, h, w], normalized as for the denoiser.
        tile: Side in pixels; None: in one piece.
    Returns:
        [B, 3, height, width] in [-1, 1], float32, on the CPU.
    Raises:
        torch.OutOfMemoryError: even the smallest tile does not fit.
    """
    scale = pixels_per_latent(vae)
    mean, std = _statistics(vae, latents)
    values = latents * std / _scaling(vae) + mean

    def run(part: Tensor) -> Tensor:
        return _on_pictures(vae, lambda values: vae.decode(values, return_dict=False)[0], part.to(vae.dtype))

    with _without_overflow(vae):
        options: dict[str, Any] = {"tile": tile, "step": scale, "gain": scale, "what": "decode", "progress": progress}
        return _in_tiles(vae, run, values, **options)


def encode(vae: Any, pictures: Tensor, *, tile: int | None, progress: bool = False) -> Tensor:
    """Encode pictures to latents: the mode of the encoder's distribution.

    Args:
        pictures: [B, 3, height, width] in [-1, 1], both sides multiples of `pixels_per_latent`.
        tile: As in `decode`.
    Returns:
        [B, C, h, w], normalized as for the denoiser, float32, on the CPU.
    """
    scale = pixels_per_latent(vae)

    def run(part: Tensor) -> Tensor:
        return _on_pictures(vae, lambda values: vae.encode(values).latent_dist.mode(), part.to(vae.dtype))

    with _without_overflow(vae):
        options: dict[str, Any] = {"tile": tile, "step": 1, "gain": 1 / scale, "what": "encode", "progress": progress}
        values = _in_tiles(vae, run, pictures, **options, align=scale)
    return normalized(vae, values)


def encode_faithfully(vae: Any, pictures: Tensor, *, tile: int | None, progress: bool = False) -> Tensor:
    """`encode`, corrected once by the error of decoding and encoding again, so that the latents decode closer to x:

        z = E(x) + (E(x) - E(D(E(x))))

    A VAE is trained on sharp pictures; it shifts the colours of enlarged, soft ones. Two passes more than `encode`.
    """
    latents = encode(vae, pictures, tile=tile, progress=progress)
    decoded = decode(vae, latents.to(pictures.device), tile=tile, progress=progress)
    reencoded = encode(vae, decoded.to(pictures.device), tile=tile, progress=progress)
    return 2 * latents - reencoded


def is_supported(vae: Any) -> bool:
    """Whether this module supports the VAE, compiled or not."""
    names = {cls.__name__ for cls in type(getattr(vae, "_orig_mod", vae)).__mro__}
    return not names.isdisjoint(_SUPPORTED)


def is_flux2(vae: Any) -> bool:
    """Whether its latents are normalized per position in a 2 x 2 patch, as FLUX.2's are."""
    return "batch_norm_eps" in vae.config


def normalized(vae: Any, latents: Tensor) -> Tensor:
    """The VAE's own latents [B, C, h, w], normalized as for the denoiser."""
    mean, std = _statistics(vae, latents)
    return (latents - mean) * _scaling(vae) / std


def _statistics(vae: Any, latents: Tensor) -> tuple[Any, Any]:
    """Mean of the VAE's own latents [B, C, h, w], and their divisor besides its scaling factor: numbers, or tensors."""
    config = vae.config
    if is_flux2(vae):
        statistics = (vae.bn.running_mean, (vae.bn.running_var + config.batch_norm_eps).sqrt())
        repeats = (1, latents.shape[-2] // 2, latents.shape[-1] // 2)
        mean, std = (one.to(latents.device).view(-1, 2, 2).repeat(repeats) for one in statistics)
        return mean, std
    means, deviations = config.get("latents_mean"), config.get("latents_std")
    if means is None or deviations is None:
        return config.get("shift_factor") or 0.0, 1.0
    mean, std = (torch.tensor(one, device=latents.device)[:, None, None] for one in (means, deviations))
    return mean, std


@contextmanager
def _without_overflow(vae: Any) -> Iterator[None]:
    """Inside, SDXL's VAE is in float32 if it was in float16 and its config does not mark it as fixed."""
    config = vae.config
    overflows = config.get("scaling_factor") == SDXL_SCALING and config.get("force_upcast")
    if vae.dtype != torch.float16 or not overflows:
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(torch.float16)


def _scaling(vae: Any) -> float:
    return float(vae.config.get("scaling_factor", 1.0))


def _on_pictures(vae: Any, run: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """`run` on pictures [B, C, h, w]; if the VAE takes videos, on videos of one frame."""
    return run(values[:, :, None])[:, :, 0] if _is_video_vae(vae) else run(values)


def _is_video_vae(vae: Any) -> bool:
    return "z_dim" in vae.config


def latent_channels(vae: Any) -> int:
    """Channels of its latents."""
    return int(vae.config.z_dim if _is_video_vae(vae) else vae.config.latent_channels)


def pixels_per_latent(vae: Any) -> int:
    """Pixels per latent, along one side."""
    if "spatial_compression_ratio" in vae.config:  # HunyuanImage's
        return int(vae.config.spatial_compression_ratio)
    return 2 ** (len(vae.config.dim_mult if _is_video_vae(vae) else vae.config.block_out_channels) - 1)


def _in_tiles(
    vae: Any,
    run: Callable[[Tensor], Tensor],
    values: Tensor,
    *,
    tile: int | None,
    step: int,
    gain: float,
    what: str,
    progress: bool,
    align: int = 1,
) -> Tensor:
    """`run` on tiles of values [B, C, rows, columns].

    Args:
        tile: In pixels.
        step: Pixels per row of values.
        gain: Rows of the result per row of values.
        align: Tiles begin at multiples of this many rows.
    """
    side = None if tile is None else max(align, tile // step // align * align)
    while True:
        try:
            with _without_own_tiles(vae):
                return _blended(vae, run, values, side, gain, what, progress, align)
        except RuntimeError as error:
            reason = why_too_large(error)
            if reason is None:
                raise
            largest = max(values.shape[-2:]) if side is None else min(side, max(values.shape[-2:]))
            smaller = largest // 2 // align * align
            if smaller * step < SMALLEST_TILE:
                raise
            logger.warning("%s: the VAE continues in tiles of %d pixels", reason, smaller * step)
            side = smaller
        torch.cuda.empty_cache()


@torch.no_grad()
def _blended(
    vae: Any,
    run: Callable[[Tensor], Tensor],
    values: Tensor,
    side: int | None,
    gain: float,
    what: str,
    progress: bool,
    align: int,
) -> Tensor:
    rows, columns = values.shape[-2:]
    heights, widths = (tile_spans(length, side, align) for length in (rows, columns))
    tiles = list(product(heights, widths))
    if side is None or len(tiles) == 1:
        return run(values).float().cpu()
    if len(values) > 1 and getattr(vae, "use_slicing", False):  # each picture has statistics of its own
        return torch.cat([_blended(vae, run, one, side, gain, what, progress, align) for one in values.split(1)])
    total = weight = None
    with whole_statistics(vae, lambda: run(_downsampled_to_tile(values, side, align))):
        for (top, bottom), (left, right) in tqdm(tiles, desc=what, unit="tile", disable=not progress):
            part = run(values[..., top:bottom, left:right]).float().cpu()
            if total is None or weight is None:
                size = round(rows * gain), round(columns * gain)
                total, weight = part.new_zeros(*part.shape[:2], *size), part.new_zeros(size)
            place = (slice(round(top * gain), round(bottom * gain)), slice(round(left * gain), round(right * gain)))
            down = _ramp(part.shape[-2], top > 0, bottom < rows)
            across = _ramp(part.shape[-1], left > 0, right < columns)
            total[..., *place] += part * down[:, None] * across
            weight[place] += down[:, None] * across
    assert total is not None and weight is not None
    return total.div_(weight)


@contextmanager
def _without_own_tiles(vae: Any) -> Iterator[None]:
    """Inside, `enable_tiling` is off: its tiles are small, and group norms would use the statistics of each tile."""
    own = getattr(vae, "use_tiling", False)
    vae.use_tiling = False
    try:
        yield
    finally:
        vae.use_tiling = own


def _downsampled_to_tile(values: Tensor, side: int, align: int) -> Tensor:
    """[B, C, rows, columns] downsampled to at most the area of a tile, both sides multiples of `align`."""
    share = min(1, side / math.sqrt(math.prod(values.shape[-2:])))
    size = [max(1, int(length * share / align)) * align for length in values.shape[-2:]]
    return interpolate(values, size=size, mode="nearest-exact")


def tile_spans(length: int, side: int | None, align: int) -> list[tuple[int, int]]:
    """Start and end of tiles: of one size, evenly spaced from border to border, overlapping by `OVERLAP` or more."""
    if side is None or length <= side:
        return [(0, length)]
    count = math.ceil((length - side) / (side * (1 - OVERLAP))) + 1
    starts = [round((length - side) * index / (count - 1) / align) * align for index in range(count)]
    return [(start, start + side) for start in starts]


def _ramp(length: int, fades_in: bool, fades_out: bool) -> Tensor:
    """Weights along one side of a tile: 1, falling linearly over the overlap to a border that has a neighbour."""
    reach = round(length * OVERLAP)
    position = torch.arange(length) + 0.5
    weight = torch.ones(length)
    if fades_in:
        weight = torch.minimum(weight, position / reach)
    if fades_out:
        weight = torch.minimum(weight, (length - position) / reach)
    return weight
