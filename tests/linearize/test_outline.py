"""Pipelines opened without weights, for plans: every component has the shapes and dtypes that loading gives."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_distill import build_tiny
from torch import nn
from whole_pipelines import WHOLE

from lineardit import Agent, Clear, from_pretrained, linearize_, save_adapter, save_merged
from lineardit.linearize.adapters.opening import open_pipeline
from lineardit.linearize.seam.conversion import overlays_of
from lineardit.linearize.weights.full_weights import replace_weights_
from lineardit.linearize.weights.low_rank import LowRank
from lineardit.pipelines.estimate import weights_on_device
from lineardit.pipelines.high_resolution import HighResolutionPipeline
from lineardit.pipelines.placement import record_placement_

PIPELINES = {"flux": build_tiny, **{name: make for name, (make, _) in WHOLE.items()}}


def parameters(pipe: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {
        f"{name}.{key}": (tuple(weight.shape), weight.dtype)
        for name, part in parts.items()
        for key, weight in part.named_parameters()
    }


@pytest.mark.parametrize("name", PIPELINES)
def test_outline_has_the_shapes_and_dtypes_of_the_loaded_pipeline(name: str, tmp_path: Path) -> None:
    PIPELINES[name]().save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        loaded = parameters(open_pipeline(tmp_path, dtype=dtype))
        for file in tmp_path.rglob("*.safetensors"):
            file.rename(file.with_suffix(".hidden"))
        assert parameters(open_pipeline(tmp_path, dtype=dtype, weights=False)) == loaded
        for file in tmp_path.rglob("*.hidden"):
            file.rename(file.with_suffix(".safetensors"))


def test_outline_needs_only_configs_and_names_the_missing_ones(tmp_path: Path) -> None:
    build_tiny().save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    for folder in tmp_path.glob("tokenizer*"):
        shutil.rmtree(folder)
    outline = open_pipeline(tmp_path, weights=False)
    assert (outline.tokenizer, outline.tokenizer_2) == (None, None)
    record_placement_(outline, torch.device("cpu"))
    assert HighResolutionPipeline.from_pipe(outline).plan(64, 64).stages[0].seconds > 0
    lacking = [f"{name}.json" for name in ("scheduler/scheduler_config", "text_encoder_2/config", "vae/config")]
    for name in lacking:
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"but no {', '.join(lacking)}: the copy is incomplete; a plan needs these fi"):
        open_pipeline(tmp_path, weights=False)


def converted(tmp_path: Path, config: Any) -> Any:
    build_tiny().save_pretrained(tmp_path / "base")
    pipe = type(build_tiny()).from_pretrained(tmp_path / "base")
    linearize_(pipe, config)
    return pipe


@pytest.mark.parametrize("trained", ["nothing", "lora", "full"])
@pytest.mark.parametrize("config", [Clear(radius=2), Agent(num_agents=4)], ids=["clear", "agent"])
def test_outline_of_a_student_matches_the_loaded_student(trained: str, config: Any, tmp_path: Path) -> None:
    pipe = converted(tmp_path, config)
    layer = "transformer_blocks.0.attn.to_q"
    if trained == "lora":
        factors = {layer: (torch.randn(2, 32), torch.randn(32, 2))}
        overlays_of(pipe.transformer).items.append(LowRank(pipe.transformer, factors, alpha=2))
    elif trained == "full":
        replace_weights_(pipe.transformer, {f"{layer}.weight": torch.randn(32, 32)}, keep_original=True)
    save_adapter(pipe, tmp_path / "adapter")
    save_merged(pipe, tmp_path / "merged")
    for name in ("adapter", "merged"):
        loaded = from_pretrained(tmp_path / name, dtype=torch.bfloat16)
        outline = from_pretrained(tmp_path / name, dtype=torch.bfloat16, weights=False)
        assert parameters(outline) == parameters(loaded)
        expected, actual = (HighResolutionPipeline.from_pipe(one)._limits() for one in (loaded, outline))
        assert actual == expected


def test_outline_of_a_bare_denoiser_reads_its_own_folder(tmp_path: Path) -> None:
    model = converted(tmp_path, Clear(radius=2, pool_size=2)).transformer  # its config names the base's folder
    model.save_pretrained(tmp_path / "plain")
    save_merged(model, tmp_path / "merged")
    for name in ("plain", "merged"):
        loaded = from_pretrained(tmp_path / name)
        outline = from_pretrained(tmp_path / name, weights=False)
        assert {key: (tensor.shape, tensor.dtype) for key, tensor in outline.state_dict().items()} == {
            key: (tensor.shape, tensor.dtype) for key, tensor in loaded.state_dict().items()
        }


def test_weights_on_device_of_an_outline_follow_its_placement(tmp_path: Path) -> None:
    build_tiny().save_pretrained(tmp_path)
    cpu, loaded = torch.device("cpu"), open_pipeline(tmp_path)
    outline = open_pipeline(tmp_path, weights=False)
    record_placement_(outline, cpu)
    counted = weights_on_device(HighResolutionPipeline.from_pipe(outline))
    assert counted == weights_on_device(loaded) > 0
    sizes = {}
    for offload in ("model", "group", "sequential"):
        record_placement_(outline, torch.device("cuda"), offload)
        sizes[offload] = weights_on_device(outline)
    assert sizes == {"model": max(map(num_bytes, loaded.components.values())), "group": 0, "sequential": 0}


def num_bytes(part: Any) -> int:
    return sum(weight.nbytes for weight in (*part.parameters(), *part.buffers())) if isinstance(part, nn.Module) else 0


def test_open_pipeline_refuses_an_unknown_impl_for_an_unconverted_base(tmp_path: Path) -> None:
    build_tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"impl must be one of auto, reference, .* got 'tield' \(did you mean tiled"):
        open_pipeline(tmp_path, impl="tield")
