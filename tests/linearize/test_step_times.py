"""Steps of the original and its conversion, timed in turn with random weights."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

from lineardit import Clear, linearize_, save_adapter
from lineardit.linearize.adapters.conversion import convert_base
from lineardit.linearize.adapters.manifest import Manifest
from lineardit.linearize.compiling import compile_
from lineardit.linearize.measures import step_times, weightless_conversion
from lineardit.linearize.measures.step_inputs import can_make_inputs, token_side
from lineardit.linearize.measures.step_times import StepTime, time_steps
from lineardit.linearize.measures.weightless_conversion import Conditions, WeightlessConversion
from lineardit.linearize.seam.conversion import conversion_of
from lineardit.linearize.weights.low_rank import LowRankTerm
from lineardit.linearize.weights.training import add_lora_
from tiny_models import FAMILIES, build

CPU = torch.device("cpu")
CONDITIONS = Conditions(device=CPU, dtype=torch.float32)
SCALE = 8  # pixels per latent where there is no VAE to read it from


def saved(model: Any, folder: Path) -> Path:
    """The config of a model, without weights."""
    model.save_config(folder)
    return folder


def adapter_of(model: Any, folder: Path) -> Path:
    convert_base(saved(model, folder / "base"), Clear(radius=1.5), output=folder / "adapter")
    return folder / "adapter"


def manifest_of(conversion: WeightlessConversion) -> Manifest:
    assert conversion.adapter is not None
    return conversion.adapter[0]


def timed(conversion: WeightlessConversion, sizes: Sequence[tuple[int, int]], **conditions: Any) -> list[StepTime]:
    conditions = Conditions(**{"device": CPU, "dtype": torch.float32, "pairs": 1} | conditions)
    return list(time_steps(conversion, sizes, conditions))


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_time_steps_supports_every_model_with_known_inputs(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(family)
    if not can_make_inputs(model):
        with pytest.raises(ValueError, match=r"inputs of a .* cannot be generated: use `lineardit evaluate`"):
            WeightlessConversion.read(adapter_of(model, tmp_path))
        return
    conversion = WeightlessConversion.read(adapter_of(model, tmp_path))
    token = SCALE * token_side(model)
    height, width = (16, 16) if family == "dit" else (8, 6)  # tokens; dit has positions for this size only
    (row,) = timed(conversion, [(height * token, width * token)], text_len=7, dtype=dtype)
    assert row.tokens == height * width
    assert row.original and row.original[0] > 0
    assert row.converted and row.converted[0] > 0
    assert row.flops.attention_before > 0 and row.runs == "masked"


def test_time_steps_yields_one_row_per_size(tmp_path: Path) -> None:
    conversion = WeightlessConversion.read(adapter_of(build("flux"), tmp_path))
    rows = timed(conversion, [(128, 64), (64, 64)], pairs=3, impl="tiled", text_len=7)
    assert [(row.height, row.width, row.tokens, row.runs) for row in rows] == [
        (128, 64, 32, "tiled"),
        (64, 64, 16, "tiled"),
    ]
    assert all(len(row.original or ()) == len(row.converted or ()) == 3 for row in rows)
    assert rows[0].original_gib is None  # not counted on a CPU
    assert rows[1].flops.attention_before == 4 * (16 + 7) ** 2 * 32 * 2  # heads * head_dim, layers


def test_original_and_conversion_alternate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enabled: list[bool] = []
    forward = step_times._TimedModel._forward

    def note(timed: Any) -> float:
        conversion = conversion_of(timed.model)
        assert conversion is not None
        enabled.append(conversion.enabled)
        return forward(timed)

    monkeypatch.setattr(step_times._TimedModel, "_forward", note)
    timed(WeightlessConversion.read(adapter_of(build("flux"), tmp_path)), [(64, 64)], pairs=2)
    assert enabled == [True, False] * 3


def test_weightless_conversion_error_names_a_moved_base(tmp_path: Path) -> None:
    adapter = adapter_of(build("flux"), tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"is no longer at .*base: pass its new location as base= \(--base\)"):
        WeightlessConversion.read(adapter)
    assert timed(WeightlessConversion.read(adapter, base=tmp_path / "moved"), [(64, 64)])


def test_speedup_is_the_median_over_pairs(tmp_path: Path) -> None:
    (row,) = timed(WeightlessConversion.read(adapter_of(build("flux"), tmp_path)), [(64, 64)])
    assert replace(row, original=(8.0, 3.0, 40.0), converted=(2.0, 1.0, 4.0)).speedup == 4
    assert replace(row, original=None).speedup is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:128] . DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["torch", "triton", "cublas", "cpu"],
)
def test_time_steps_leaves_out_an_original_that_runs_out_of_memory(
    error: RuntimeError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversion = WeightlessConversion.read(adapter_of(build("flux"), tmp_path))
    attend = FluxAttnProcessor.__call__

    def run_out_of_memory(self: Any, attention: Any, hidden_states: Tensor, *rest: Any, **options: Any) -> Any:
        if not hidden_states.is_meta and hidden_states.shape[1] > 60 and not states[0].enabled:
            raise RuntimeError("a block failed") from error
        return attend(self, attention, hidden_states, *rest, **options)

    states: list[Any] = []
    monkeypatch.setattr(step_times, "compile_", lambda model: states.append(conversion_of(model)))
    monkeypatch.setattr(FluxAttnProcessor, "__call__", run_out_of_memory)
    small, large = timed(conversion, [(64, 64), (128, 128)], text_len=7, compiled=True)
    assert small.original and small.converted
    assert large.original is None and large.speedup is None
    assert large.converted and len(large.converted) == 1


def test_lora_of_a_trained_adapter_runs_only_in_the_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build("flux")
    base.save_pretrained(tmp_path / "base")
    student = type(base).from_pretrained(tmp_path / "base")
    linearize_(student, Clear(radius=1.5))
    add_lora_(student, rank=2, alpha=2)
    save_adapter(student, tmp_path / "adapter")
    calls: list[int] = []
    forward = LowRankTerm.forward
    monkeypatch.setattr(LowRankTerm, "forward", lambda *given: calls.append(1) or forward(*given))
    timed(WeightlessConversion.read(tmp_path / "adapter"), [(64, 64)], pairs=2)
    layers = sum(isinstance(module, LowRankTerm) for module in student.modules())
    assert layers > 0
    assert len(calls) == 3 * layers  # one forward warms up


def test_compiled_blocks_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []
    monkeypatch.setattr(step_times, "compile_", lambda model: compiled.append(compile_(model, backend="eager")))
    (row,) = timed(WeightlessConversion.read(adapter_of(build("flux"), tmp_path)), [(64, 64)], compiled=True)
    assert compiled == [2]
    assert row.original and row.converted


def test_supported_sizes_skips_sizes_without_positions_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    conversion = WeightlessConversion.read(adapter_of(build("sd3"), tmp_path))  # up to 32 tokens of 16 pixels a side
    assert conversion.supported_sizes([(64, 64), (1024, 1024)], CONDITIONS, require_all=False) == [(64, 64)]
    assert "skipped, a SD3Transformer2DModel with this config has no positions for 1024x1024" in caplog.text
    with pytest.raises(ValueError, match="no positions for 2048x2048"):
        conversion.supported_sizes([(1024, 1024), (2048, 2048)], CONDITIONS, require_all=False)


def test_time_steps_refuses_what_cannot_be_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved(build("sd3"), tmp_path / "base")
    with pytest.raises(ValueError, match=r"is an unconverted base .*`lineardit convert .* -o DIR` writes an adapter"):
        WeightlessConversion.read(base)
    convert_base(base, Clear(radius=2), output=tmp_path / "adapter")
    conversion = WeightlessConversion.read(tmp_path / "adapter")
    for size, message in (
        ((100, 64), "multiples of 16 pixels for this model, got 64x100"),
        ((1024, 64), "no positions for 64x1024"),
    ):
        with pytest.raises(ValueError, match=message):
            timed(conversion, [size])
    with pytest.raises(ValueError, match=r"has no impl 'tile' \(did you mean tiled"):
        timed(conversion, [(64, 64)], impl="tile")
    with pytest.raises(ValueError, match="pairs must be >= 1, got 0"):
        timed(conversion, [(64, 64)], pairs=0)
    other = replace(conversion, adapter=(replace(manifest_of(conversion), model_class="FluxTransformer2DModel"), {}))
    with pytest.raises(ValueError, match="a FluxTransformer2DModel; this model is a SD3Transformer2DModel"):
        other.supported_sizes([(64, 64)], CONDITIONS)
    lumina = WeightlessConversion.read(adapter_of(build("lumina2"), tmp_path / "lumina"))
    with pytest.raises(ValueError, match=r"a step of a Lumina2.* at 64x64 failed \(.*Error: index"):
        timed(lumina, [(64, 64)], text_len=900)  # its table of positions is shorter
    monkeypatch.setattr(
        weightless_conversion.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2**10})
    )
    with pytest.raises(
        ValueError, match=r"weights of this SD3Transformer2DModel are .* GiB in float32, but 0.0 are free"
    ):
        timed(conversion, [(64, 64)])
