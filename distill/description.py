"""A summary of a run, logged before it starts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..linearize.report import SwapReport
from ..linearize.weights.quantized import num_weights, quantized_types, stored_tensors
from .config import DistillConfig, Lora
from .config_tables import config_to_tables
from .data import TeacherSamples
from .student import KERNEL, trained_parameters

GIB = 2**30
# Vectors of the model's width that a step keeps per token and block: those saved by autograd (counted on FLUX's
# blocks), and the attention outputs of student and teacher.
_SAVED_VECTORS, _OUTPUT_VECTORS = 14, 2


def describe_run(
    config: DistillConfig, model: nn.Module, report: SwapReport, samples: TeacherSamples, processes: int, *, mixed: bool
) -> str:
    """A few lines of text: what is trained on what, for how long, and about how much memory a process needs.

    Args:
        mixed: Whether the student computes in bfloat16.
    """
    trained = trained_parameters(model)
    count = sum(parameter.numel() for parameter in trained.values())
    kernel = sum(parameter.numel() for name, parameter in trained.items() if KERNEL in name)
    total = sum(map(num_weights, model.parameters()))
    base = config.base.model + (f", starting from {config.start.adapter}" if config.start.adapter else "")
    if quantized_types(model):
        base += ", quantized"
    what = f"LoRA of rank {config.trained.rank}" if isinstance(config.trained, Lora) else "attention projections"
    ema = config.trained.ema
    what += f", evaluated and saved as their moving average with decay {ema:g}" if ema else ""
    loss = " + ".join(f"{weight:g} {name}" for name, weight in config_to_tables(config)["loss"].items() if weight)
    grids = sorted({sample.grid for sample in samples.samples if sample.grid})
    sizes = sorted({(sample.width, sample.height) for sample in samples.samples})
    kept = f"{samples.calls} calls recorded of each" if samples.calls else "final latents"
    micro = config.run.batch_size // (processes * config.run.gradient_accumulation)
    lines = {
        "base": base,
        "trained": f"{what}: {len(trained)} tensors, {count:,} of {total:,} parameters ({kernel:,} in kernels)",
        "loss": f"{loss}; AdamW, rate {config.optimizer.lr:g}, {config.schedule.kind}{describe_warmup(config)}; "
        f"{'bfloat16' if mixed else 'float32'} for the student",
        "data": f"{len(samples)} samples ({config.validate.samples} held out), {kept}, "
        + ", ".join(f"{width}x{height}" for width, height in sizes)
        + "".join(f", {rows}x{columns} = {rows * columns} image tokens" for rows, columns in grids),
        "steps": f"{_describe_layerwise(config)}{config.run.steps} of {config.run.batch_size} samples = "
        + _describe_batch(config, processes, micro, samples.calls),
        "memory": _describe_memory(config, model, report, grids, micro, mixed),
    }
    return "\n".join(f"{name:>8}: {text}" for name, text in lines.items())


def _describe_batch(config: DistillConfig, processes: int, micro: int, calls: int) -> str:
    """How a step's batch is split; with kept calls, each forward takes one."""
    accumulated = config.run.gradient_accumulation
    accumulated, micro = (accumulated * micro, 1) if calls else (accumulated, micro)
    return f"{processes} processes x {accumulated} accumulated x {micro}"


def describe_warmup(config: DistillConfig) -> str:
    """The warm-up of the learning rate, and whether the run is too short for it."""
    warmup, steps = config.schedule.warmup, config.run.steps
    short = f", but the run has only {steps}: it reaches {min(steps / max(1, warmup), 1):.0%} of the rate"
    return (f" after {warmup} steps of warm-up" if warmup else "") + (short if warmup > steps else "")


def _describe_layerwise(config: DistillConfig) -> str:
    first = config.layerwise
    return f"{first.steps} layer by layer at rate {first.lr:g}, then " if first.steps else ""


def _describe_memory(
    config: DistillConfig,
    model: nn.Module,
    report: SwapReport,
    grids: Sequence[tuple[int, int]],
    micro: int,
    mixed: bool,
) -> str:
    """Memory estimate; includes activations only if the grids are known, assuming one width for all blocks."""
    weights = sum(stored.nbytes for parameter in model.parameters() for stored in stored_tensors(parameter))
    trained = sum(parameter.nbytes for parameter in trained_parameters(model).values())
    parts = {"weights": weights, "gradients and AdamW": 3 * trained}  # AdamW has two moments
    if config.trained.ema:
        parts["moving average"] = trained
    if grids:
        shape: Any = model.config
        width = shape.num_attention_heads * shape.attention_head_dim
        vector = micro * max(rows * columns for rows, columns in grids) * width * (2 if mixed else 4)
        blocks = len(report.swapped)
        saved = blocks + _SAVED_VECTORS if config.run.gradient_checkpointing else blocks * _SAVED_VECTORS
        parts["activations (rough)"] = vector * (saved + (blocks * _OUTPUT_VECTORS if config.loss.attention else 0))
    total = sum(parts.values())
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    rest = "" if grids else ", plus activations"
    return f"about {total / GIB:.2f} GiB per process on {device}: {listed}{rest}"
