"""Pictures of 4K to 8K from a pipeline after `linearize_`: a cascade of diffusers' own image-to-image calls.

    native size          the original attention, as the stock pipeline has it, bit for bit
    each larger stage    decode, enlarge (Lanczos), encode, add noise, denoise with linear attention: `plan.py`
    the end              decode in tiles (`vae.py`), crop to the size asked for

The weights are those of the pipeline that it is made from: LoRA, offloading and adapters hold for both. This is what
families share; `flux.py` has what FLUX.1 takes and how one of its stages runs.

B pictures, N image tokens, C numbers of a token.
"""

import inspect
import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from ..linearize.convert import denoiser, dense
from ..linearize.errors import UnsupportedModelError
from ..linearize.logits import scaled_logits
from ..linearize.opening import open_pipeline
from ..linearize.seam import state_of
from ..linearize.standing import advice_on
from .latents import unpack_latents
from .plan import Attention, Plan, Stage
from .positions import exact_positions, rope_scaled
from .running_kernels import kernels_told
from .token_chunks import in_token_chunks
from .vae import decode, encode_faithfully, pixels_per_latent

logger = logging.getLogger(__name__)

OnStage = Callable[[Any, int, dict[str, Any]], None]


@dataclass(frozen=True)
class Start:
    """Where a cascade begins: with stage `stage`, from pictures to enlarge or from the stage before's latents."""

    stage: int = 0
    pictures: list[Image.Image] | None = None
    latents: Tensor | None = None


class HighResolutionPipeline(DiffusionPipeline):
    """A cascade around a pipeline's parts; `from_pipe` gives the class of its family.

    Attributes:
        native_size: Side in pixels of the square pictures that the model was trained on.
    """

    native_size: int

    @classmethod
    def from_pipe(cls, pipeline: Any, *, native_size: int | None = None) -> Any:
        """The high-resolution pipeline around the parts of another; nothing is copied or cast.

        Args:
            pipeline: Of FLUX.1, converted or not, on its device, offloaded or not.
            native_size: Side in pixels of the square pictures that the model was trained on; None: what the VAE's
                config says, else the pipeline's default (1024 for FLUX.1).
        Raises:
            UnsupportedModelError: there is no high-resolution pipeline for this model yet.
            ValueError: the native size is none.
        """
        if native_size is not None and (type(native_size) is not int or native_size < 1):
            raise ValueError(f"native_size must be an integer >= 1 or None, got {native_size!r}")
        from .flux import FluxHighResolutionPipeline  # which derives from this class

        families = {"FluxTransformer2DModel": FluxHighResolutionPipeline}
        model: Any = denoiser(pipeline)[1]
        name = type(model).__name__
        if name not in families:
            raise UnsupportedModelError(
                f"high resolution is built for {', '.join(families)}, got a {name}: after linearize_ call its own "
                "pipelines, text-to-image at native size and image-to-image at larger ones"
            )
        if getattr(pipeline, "vae", None) is None:
            raise UnsupportedModelError(f"high resolution needs the VAE of the {type(pipeline).__name__}, it has none")
        channels: Any = 4 * pipeline.vae.config.latent_channels
        if model.config.in_channels != channels:
            raise UnsupportedModelError(
                f"this {name} takes {model.config.in_channels} numbers a token where text-to-image takes {channels} "
                "(Fill, Canny, Depth): use its own pipelines"
            )
        family: Any = families[name]
        expected = inspect.signature(family.__init__).parameters
        made = family(**{part: module for part, module in pipeline.components.items() if part in expected})
        made.native_size = native_size or _native_size(made)
        for remembered in ("_all_hooks", "_offload_device", "_offload_gpu_id"):  # of enable_model_cpu_offload
            if hasattr(pipeline, remembered):
                setattr(made, remembered, getattr(pipeline, remembered))
        return made

    @classmethod
    def from_pretrained(
        cls, name: Any, *, native_size: int | None = None, dtype: torch.dtype | None = None, **options: Any
    ) -> Any:
        """`from_pipe` of an adapter with its base, or of a whole pipeline.

        Args:
            name: Folder or Hub id.
            native_size: As of `from_pipe`.
            dtype: Of the weights; None: float32.
            options: `base`, `revision`, `offline`, `impl`, as of `lineardit.from_pretrained`.
        Returns:
            The cascade, on the CPU.
        Raises:
            ValueError: what `lineardit.from_pretrained` and `from_pipe` refuse.
        """
        weights = "float32" if dtype is None else str(dtype).removeprefix("torch.")
        return cls.from_pipe(open_pipeline(name, dtype=weights, **options), native_size=native_size)

    @abstractmethod
    def _denoise(
        self, stage: Stage, clean: Tensor | None, call: dict[str, Any], generator: Any, on_step_end: Any
    ) -> Tensor:
        """One stage from clean latents [B, C, h, w] (None: from noise alone); its latents [B, N, C]."""

    def _cascade(
        self,
        plan: Plan,
        start: Start,
        call: dict[str, Any],
        generators: list[Any],
        on_step_end: Any,
        on_stage_end: OnStage | None,
    ) -> tuple[Tensor, Stage]:
        """The latents [B, N, C] of the last stage that ran, and which that was."""
        pictures, latents = start.pictures, start.latents
        self._interrupt = False
        for number in range(start.stage, len(plan.stages)):
            stage = plan.stages[number]
            if number > 0:
                assert latents is not None
                pictures = self._pictures(latents, plan.stages[number - 1], plan.tile)
                if on_stage_end is not None:
                    on_stage_end(self, number - 1, {"images": pictures})
                    if self.interrupt:
                        return latents, plan.stages[number - 1]
            clean = None if pictures is None else self._enlarged(pictures, stage, plan.tile)
            with self._told(number, plan), self._as_planned(stage):
                latents = self._denoise(stage, clean, call, generators[number], on_step_end)
            if on_stage_end is not None:
                on_stage_end(self, number, {"latents": latents})
            if self.interrupt:
                break
        assert latents is not None
        return latents, stage

    @contextmanager
    def _as_planned(self, stage: Stage) -> Iterator[None]:
        """The model as this stage wants it."""
        _, model = denoiser(self)
        converted = state_of(model) is not None
        original = dense(model) if converted and stage.attention == "original" else nullcontext()
        logits = scaled_logits(model, stage.logit_factor) if stage.logit_factor != 1 else nullcontext()
        chunks = nullcontext() if stage.chunk_tokens is None else in_token_chunks(model, stage.chunk_tokens)
        with original, logits, exact_positions(model), rope_scaled(model, stage.rope_factor), chunks:
            yield

    @contextmanager
    def _told(self, number: int, plan: Plan) -> Iterator[None]:
        """Progress of the steps of one stage, and the log of how long it took."""
        stage = plan.stages[number]
        before = dict(getattr(self, "_progress_bar_config", {}))
        what = f"stage {number + 1} of {len(plan.stages)}, {stage.width}x{stage.height}, {stage.attention} attention"
        self.set_progress_bar_config(**{"unit": "step", **before, "desc": what})
        began = time.perf_counter()
        kernels = kernels_told(self, what) if stage.attention == "converted" else nullcontext()
        try:
            with kernels:
                yield
        finally:
            self.set_progress_bar_config(**before)
        logger.info("%s: %.1f s", what, time.perf_counter() - began)

    def _attention(self) -> Attention:
        """What the model can run."""
        _, model = denoiser(self)
        if state_of(model) is None:
            return "original"
        try:
            with dense(model):
                return "both"
        except (ValueError, RuntimeError):  # the originals of trained weights were not kept
            return "converted"

    def _with_advice(self, plan: Plan, multiple: int) -> Plan:
        """The plan, with what the converted attention says about its last size; `multiple`: pixels of a token."""
        last = plan.stages[-1]
        if last.attention == "original":
            return plan
        advice = advice_on(denoiser(self)[1], (last.height // multiple, last.width // multiple))
        return replace(plan, notes=(*plan.notes, *advice))

    def _pictures(self, latents: Tensor, stage: Stage, tile: int | None) -> list[Image.Image]:
        return self.image_processor.postprocess(self._decoded(latents, stage, tile), output_type="pil")

    def _decoded(self, latents: Tensor, stage: Stage, tile: int | None) -> Tensor:
        """[B, N, C] -> [B, 3, height, width] in [-1, 1]."""
        scale = pixels_per_latent(self.vae)
        planes = unpack_latents(latents, stage.height // scale, stage.width // scale)
        return decode(self.vae, planes, tile=tile, progress=self._shows_progress())

    def _enlarged(self, pictures: Any, stage: Stage, tile: int | None) -> Tensor:
        """Clean latents [B, C, h, w] of pictures at the stage's size."""
        pixels = self.image_processor.preprocess(pictures, height=stage.height, width=stage.width)
        how: dict[str, Any] = {"tile": tile, "progress": self._shows_progress()}
        latents = encode_faithfully(self.vae, pixels.to(self._execution_device), **how)
        return latents.to(self._execution_device)

    @torch.no_grad()
    def decode_last(self, latents: Tensor, plan: Plan) -> list[Image.Image]:
        """The pictures of a plan's last stage from its latents [B, N, C], as a callback got them."""
        pictures = self._finish(latents.to(self._execution_device), plan.stages[-1], plan, "pil")
        self.maybe_free_model_hooks()
        return pictures

    def _finish(self, latents: Tensor, stage: Stage, plan: Plan, output_type: str) -> Any:
        """The pictures at the size asked for, or smaller where the call was interrupted."""
        pixels = self._decoded(latents, stage, plan.tile)[..., : plan.height, : plan.width]
        return self.image_processor.postprocess(pixels, output_type=output_type)

    def _shows_progress(self) -> bool:
        return not getattr(self, "_progress_bar_config", {}).get("disable", False)


def _native_size(pipe: Any) -> int:
    said = pipe.vae.config.get("sample_size")
    # 32 is what a config that leaves it out gets
    return pipe.default_sample_size * pixels_per_latent(pipe.vae) if said in (None, 32) else said


def stage_generators(generator: Any, count: int) -> list[Any]:
    """One generator, or list of them, for each stage: the user's for the first, for the others new ones.

    Their seeds come from a copy of the user's, so that a cascade that goes on at a later stage draws the same noise,
    and the first stage is the stock pipeline's.
    """
    if generator is None:
        return [None] * count
    if isinstance(generator, list):
        return [list(one) for one in zip(*(stage_generators(one, count) for one in generator), strict=True)]
    seeds = torch.randint(2**62, (count,), generator=generator.clone_state(), device=generator.device).tolist()
    return [generator, *(torch.Generator(generator.device).manual_seed(seed) for seed in seeds[1:])]
