"""Pictures of 4K to 8K: a cascade of calls of diffusers' own pipeline.

    native size          the stock pipeline's call with the original attention, bit for bit
    each larger stage    decode, enlarge (`pictures.py`), encode, add noise, denoise with linear attention: `plan.py`
    the end              decode in tiles (`vae.py`), crop to the requested size

The cascade shares its weights with the pipeline it is made from; LoRA, offloading and adapters apply to both.
`stock.py` defines which pipelines are supported and `stage_schedule.py` how a stage starts from a picture; `stages.py`
runs the stages.

B pictures; latents are [B, C, h, w], or [B, N, C] where the model takes FLUX's tokens.
"""

import inspect
import logging
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from diffusers import ImagePipelineOutput
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from torch import Tensor

from ..linearize.adapters.opening import open_pipeline
from ..linearize.convert import check_dense
from ..linearize.describe import advice_on
from ..linearize.networks import denoiser
from ..linearize.seam.conversion import conversion_of
from .cascade_class import build_from, cascade_class
from .checks import (
    check_counts,
    check_numbers,
    check_output_type,
    check_plan,
    check_stages,
    check_start,
    count_pictures,
)
from .estimate import Estimator
from .low_frequencies import OnStep
from .pictures import as_pictures
from .placement import PLACEMENT_KEY
from .plan import Attention, Limits, Plan, Settings, Stage
from .planning import cascade
from .positions import table_side
from .sizes import size_multiple
from .stage_schedule import largest_shift, matches_flows
from .stages import OnStage, StagedPipeline, Start, stage_generators
from .stock import max_side_tokens, packs_latents, rope_dim, stock_class, trained_size
from .token_chunks import supports_chunks
from .vae import latent_channels, pixels_per_latent

logger = logging.getLogger(__name__)

# Attributes of a pipeline besides components and config: of enable_model_cpu_offload, SDXL's watermark, and our note.
_COPIED_ATTRIBUTES = ("_all_hooks", "_offload_device", "_offload_gpu_id", "hf_device_map", "watermark", PLACEMENT_KEY)


class HighResolutionPipeline(StagedPipeline):
    """A cascade around the components of a pipeline; `from_pipe` returns the subclass for its model.

    Attributes:
        native_size: Side in pixels of the square pictures that the model was trained on.
    """

    native_size: int

    @classmethod
    def from_pipe(cls, pipeline: Any, *, native_size: int | None = None) -> Any:
        """Make a high-resolution pipeline from the components of another; nothing is copied or cast.

        Args:
            pipeline: A text-to-image pipeline, converted or not, on its device, offloaded or not.
            native_size: Side in pixels of the square pictures that the model was trained on; None: from the defaults of
                the pipeline and the configs of model and VAE (1024 for FLUX.1).
        Raises:
            UnsupportedModelError: there is no cascade for this model.
            ValueError: native_size is not an integer >= 1.
        """
        if native_size is not None and (type(native_size) is not int or native_size < 1):
            raise ValueError(f"native_size must be an integer >= 1 or None, got {native_size!r}")
        made = build_from(_cascade_class(stock_class(pipeline)), pipeline)
        made.native_size = native_size or trained_size(made)
        for attribute in (name for name in _COPIED_ATTRIBUTES if hasattr(pipeline, name)):
            setattr(made, attribute, getattr(pipeline, attribute))
        return made

    @classmethod
    def from_pretrained(
        cls, name: Any, *, native_size: int | None = None, dtype: torch.dtype | None = None, **options: Any
    ) -> Any:
        """Load an adapter with its base, or a whole pipeline, converted or not, and call `from_pipe`.

        Args:
            name: Folder or Hub id. An unconverted pipeline uses full attention in every stage; the plan notes it.
            native_size: As in `from_pipe`.
            dtype: Dtype of the weights; None: float32.
            options: `base`, `revision`, `variant`, `quantization_config` and so on, as in `lineardit.from_pretrained`.
        Returns:
            The cascade, on the CPU unless `device_map` is given.
        Raises:
            ValueError: as in `lineardit.from_pretrained` and `from_pipe`.
        """
        return cls.from_pipe(open_pipeline(name, dtype=dtype or torch.float32, **options), native_size=native_size)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles name the stock class: ours is made on demand and cannot be imported."""
        return _blank, (self.stock,), self.__dict__.copy()

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Save the components as the stock pipeline, which `from_pretrained` loads as a cascade."""
        build_from(self.stock, self).save_pretrained(save_directory, **options)

    def plan(
        self,
        height: int | None = None,
        width: int | None = None,
        *,
        num_inference_steps: int | None = None,
        settings: Settings | None = None,
        enlarge: bool | tuple[int, int] = False,
        tile: int | None = 1024,
        text_len: int | None = None,
        batch: int = 1,
    ) -> Plan:
        """The plan of a call at this size, to print, change, and pass to the call.

        Args:
            height, width: In pixels; None: the native size. A size the model cannot make is rounded up and cropped.
            num_inference_steps: Steps of the first stage, or, if a picture is enlarged without settings, of each stage;
                None: the pipeline's default.
            settings: Settings of the later stages.
            enlarge: Plan the enlargement of an existing picture, of native size (True) or of this (height, width).
            tile: Side in pixels of the VAE's tiles; None: in one piece.
            text_len, batch: Text tokens (None: the pipeline's default) and pictures, for the estimates of time and
                memory.
        Raises:
            ValueError: a setting is out of range, or the model or its scheduler does not support it.
        """
        check_counts(batch, text_len)
        limits, parameters = self._limits(), inspect.signature(self.stock.__call__).parameters
        if enlarge is not False and num_inference_steps is not None:
            settings = settings or Settings(steps=num_inference_steps)
        if num_inference_steps is None:
            num_inference_steps = parameters["num_inference_steps"].default
        default_text_len = parameters["max_sequence_length"].default if "max_sequence_length" in parameters else None
        plan = cascade(
            limits.native if height is None else height,
            limits.native if width is None else width,
            limits,
            Settings() if settings is None else settings,
            first_steps=num_inference_steps,
            enlarge=enlarge,
            text_len=text_len or default_text_len or 77,
            tile=tile,
        )
        check_stages(plan, limits, self.scheduler)
        plan = self._with_advice(plan, limits)
        if not Estimator.supports(denoiser(self)[1]):
            return plan
        plan = Estimator(self, text_len, batch).with_costs(plan, chunks=limits.chunks)
        if getattr(self, "controlnet", None) is not None:
            plan = replace(plan, notes=(*plan.notes, "the estimates do not include the ControlNet"))
        return plan

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        image: Any = None,
        plan: Plan | None = None,
        settings: Settings | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStep | None = None,
        callback_on_stage_end: OnStage | None = None,
        start_latents: Tensor | None = None,
        start_stage: int = 0,
        **call: Any,
    ) -> Any:
        """Generate pictures. Other arguments are those of the stock pipeline's call (`stock`).

        Args:
            height, width: In pixels, any; None: those of the plan, or the native size.
            image: Pictures to enlarge, in place of the first stage (`as_pictures`); if fewer than the outputs, each is
                used for an equal number of them.
            plan: From `plan()`, possibly changed; None: the plan for this size and these `settings`.
            num_inference_steps: Steps of the first stage; None: the pipeline's default.
            callback_on_step_end: Called after each step of each stage, as in diffusers. Steps are counted within a
                stage; `pipe.stage` and `pipe.stage_number` identify it.
            callback_on_stage_end: Called as callback(pipe, stage, {"latents": tensor}) when a stage is denoised, and as
                callback(pipe, stage, {"images": [PIL]}) when it is decoded (also for `start_latents`); the pictures of
                the last stage are returned instead.
            start_latents, start_stage: Continue after stage `start_stage` - 1 from the latents that the callback
                received for it, with a generator in its state before the whole call, that is, seeded again.
        Returns:
            `ImagePipelineOutput`, or Stable Diffusion's output class with the result of its safety checker; with
            output_type="latent", the latents of the last stage in the model's format, uncropped.
        Raises:
            TypeError: the stock pipeline does not take an argument.
            ValueError: arguments contradict each other, or diffusers rejects them.
        """
        check_output_type(output_type)
        pictures = None if image is None else as_pictures(image)
        if plan is None:
            plan = self.plan(
                height,
                width,
                num_inference_steps=num_inference_steps,
                settings=settings,
                enlarge=False if pictures is None else (pictures[0].height, pictures[0].width),
                text_len=call.get("max_sequence_length"),
            )
        else:
            check_plan(plan, height, width, num_inference_steps, settings)
        check_stages(plan, self._limits(), self.scheduler)
        check_start(plan, pictures, start_latents, start_stage)
        batch = count_pictures(prompt, call)
        shape = self._shape_of_latents(plan.stages[start_stage - 1])
        check_numbers(batch, pictures, generator, start_latents, shape, start_stage - 1)
        logger.info("%s", plan)
        latents, stage = self._cascade(
            plan,
            Start(start_stage, pictures, start_latents),
            self._stage_arguments(prompt, call, callback_on_step_end),
            stage_generators(generator, len(plan.stages)),
            batch,
            callback_on_step_end,
            callback_on_stage_end,
        )
        self.maybe_free_model_hooks()  # the denoiser leaves the GPU before the VAE runs
        images, unsafe = latents, None
        if output_type != "latent":
            images, unsafe = self._finish(latents, stage, plan, output_type)
        self.maybe_free_model_hooks()
        if hasattr(self, "safety_checker"):
            output: Any = StableDiffusionPipelineOutput(images=images, nsfw_content_detected=unsafe)
        else:
            output = ImagePipelineOutput(images=images)
        return output if return_dict else tuple(getattr(output, name) for name in output.__dataclass_fields__)

    def _attention(self) -> Attention:
        """The attention that the model can run."""
        _, model = denoiser(self)
        if conversion_of(model) is None:
            return "original"
        try:
            check_dense(self)
        except ValueError:
            return "converted"
        return "both"

    def _limits(self) -> Limits:
        """The properties of model and scheduler, in their current state, that a plan depends on."""
        model: Any = denoiser(self)[1]
        flows, multiple = matches_flows(self.scheduler), size_multiple(self)
        max_tokens, table = max_side_tokens(model), table_side(model)
        return Limits(
            native=self.native_size,
            multiple=multiple,
            largest_shift=largest_shift(self.scheduler) if flows else None,
            rope_dim=rope_dim(model),
            attention=self._attention(),
            follows=flows and "callback_on_step_end" in inspect.signature(self.stock.__call__).parameters,
            largest=None if max_tokens is None else max_tokens * multiple,
            table=None if table is None else table * multiple,
            counts_tokens="UNet" not in type(model).__name__,
            chunks=supports_chunks(model),
        )

    def _with_advice(self, plan: Plan, limits: Limits) -> Plan:
        """The plan, with the converted attention's advice on its sizes."""
        if plan.stages[-1].attention == "original" or not limits.counts_tokens:
            return plan
        side, converted = limits.multiple, [stage for stage in plan.stages if stage.attention == "converted"]
        advice = advice_on(denoiser(self)[1], [(stage.height // side, stage.width // side) for stage in converted])
        return replace(plan, notes=(*plan.notes, *advice))

    def _shape_of_latents(self, stage: Stage) -> list[int]:
        """The shape of one picture's latents in the model's format."""
        scale, channels = pixels_per_latent(self.vae), latent_channels(self.vae)
        rows, columns = stage.height // scale, stage.width // scale
        return [rows * columns // 4, 4 * channels] if packs_latents(self) else [channels, rows, columns]


@cache
def _cascade_class(stock: Any) -> Any:
    return cascade_class(HighResolutionPipeline, stock)


def _blank(stock: Any) -> Any:
    cls = _cascade_class(stock)
    return cls.__new__(cls)
