"""Loading a pipeline from an adapter or from a plain save_pretrained."""

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_distill import build_tiny
from tiny_pipelines import flux_pipeline, plain, saved_flux_pipeline, student_of
from torch import Tensor

import lineardit
from lineardit import Clear, dense, from_pretrained, linearize_, load_adapter_, restore_, save_adapter
from lineardit.linearize import swapped
from lineardit.linearize.adapters.base import read_base
from lineardit.linearize.adapters.opening import open_pipeline
from lineardit.linearize.adapters.stored_weights import stored_dtype, stored_dtypes
from lineardit.linearize.measures.inspection import inspect_base
from lineardit.linearize.measures.weightless_conversion import WeightlessConversion
from tiny_models import build, inputs_of


def run(pipe: diffusers.DiffusionPipeline, arguments: dict) -> Tensor:
    with torch.no_grad():
        return pipe.transformer(**arguments)[0]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved_flux_pipeline(tmp_path / "base")


@pytest.fixture(params=["kernels", "lora", "full"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_from_pretrained_loads_the_student_on_the_base_named_by_its_adapter(
    base: Path, kind: str, tmp_path: Path
) -> None:
    student, arguments = student_of(base, kind), inputs_of("flux")
    save_adapter(student, tmp_path / "adapter")
    pipe = from_pretrained(tmp_path / "adapter")
    assert type(pipe) is diffusers.FluxPipeline
    assert torch.equal(run(pipe, arguments), run(student, arguments))
    restore_(pipe)
    assert torch.equal(run(pipe, arguments), run(plain(base), arguments))


def test_from_pretrained_loads_in_the_given_dtype(base: Path, tmp_path: Path) -> None:
    save_adapter(student_of(base, "lora"), tmp_path / "adapter")
    pipe = from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
    assert {weight.dtype for name, weight in pipe.transformer.named_parameters() if "kernel" not in name} == {
        torch.bfloat16
    }


def test_from_pretrained_without_a_dtype_loads_every_component_in_float32(tmp_path: Path) -> None:
    """Including text encoders stored in half precision, which the libraries would leave so."""
    build_tiny().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    student = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "half")
    linearize_(student, Clear(radius=2))
    save_adapter(student, tmp_path / "adapter")
    pipe = from_pretrained(tmp_path / "adapter")
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert len(parts) > 2
    assert {part.dtype for part in parts} == {torch.float32}
    stored = from_pretrained(tmp_path / "adapter", dtype="auto")
    assert stored.transformer.dtype == torch.bfloat16


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_stored_dtypes_are_those_of_every_part_with_weights(tmp_path: Path, variant: str | None) -> None:
    pipe = build_tiny()
    pipe.transformer.to(torch.bfloat16)
    pipe.text_encoder_2.to(torch.float16)
    pipe.save_pretrained(tmp_path, variant=variant)
    if variant is not None:  # a part without the variant
        shutil.rmtree(tmp_path / "vae")
        pipe.vae.save_pretrained(tmp_path / "vae")
    expected = {
        "transformer": torch.bfloat16,
        "text_encoder": torch.float32,
        "text_encoder_2": torch.float16,
        "vae": torch.float32,
    }
    assert stored_dtypes(read_base(tmp_path), variant=variant) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "Auto", 16])
def test_from_pretrained_refuses_an_invalid_dtype(dtype: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype must be a torch.dtype, 'auto' or None, got"):
        from_pretrained(tmp_path, dtype=dtype)


def test_from_pretrained_accepts_the_new_place_of_a_moved_base(base: Path, tmp_path: Path) -> None:
    student, arguments = student_of(base, "lora"), inputs_of("flux")
    save_adapter(student, tmp_path / "adapter")
    new_base = base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"is no longer at .*base: pass its new location as base= \(--base\)"):
        from_pretrained(tmp_path / "adapter")
    assert torch.equal(run(from_pretrained(tmp_path / "adapter", base=new_base), arguments), run(student, arguments))


def test_from_pretrained_loads_a_bare_denoiser(tmp_path: Path) -> None:
    model, arguments = build("pixart"), inputs_of("pixart")
    model.save_pretrained(tmp_path / "base")
    student = type(model).from_pretrained(tmp_path / "base")
    linearize_(student, Clear(radius=2))
    save_adapter(student, tmp_path / "adapter")
    loaded = from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(**arguments)[0], student(**arguments)[0])


def test_save_pretrained_loads_as_the_student_with_one_warning(
    base: Path, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, arguments = student_of(base, kind), inputs_of("flux")
    student.save_pretrained(tmp_path / "saved")
    caplog.clear()
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    for name in ("diffusers.configuration_utils", "diffusers.models.modeling_utils"):
        caplog.set_level(logging.WARNING, name)
    pipe = from_pretrained(tmp_path / "saved")
    # diffusers' messages about unknown config entries and tensors
    assert "not expected" not in caplog.text and "were not used" not in caplog.text
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("lineardit")]
    assert "save_adapter" in message
    assert torch.equal(run(pipe, arguments), run(student, arguments))
    if kind == "full":  # the base's own weights are not in that folder
        with pytest.raises(ValueError, match="originals"):
            restore_(pipe)
    else:
        with dense(pipe):
            assert torch.equal(run(pipe, arguments), run(plain(base), arguments))
    adapters = [save_adapter(model, tmp_path / name) for model, name in ((student, "first"), (pipe, "second"))]
    first, second = (load_file(folder / "lineardit.safetensors") for folder in adapters)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_save_pretrained_in_shards_loads_as_the_student(base: Path, tmp_path: Path) -> None:
    student, arguments = student_of(base, "lora"), inputs_of("flux")
    student.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    assert len(list((tmp_path / "saved" / "transformer").glob("*.safetensors"))) > 1
    assert torch.equal(run(from_pretrained(tmp_path / "saved"), arguments), run(student, arguments))


def test_save_pretrained_after_restore_writes_the_plain_base(base: Path, tmp_path: Path) -> None:
    student = student_of(base, "lora")
    restore_(student)
    student.save_pretrained(tmp_path / "saved")
    for file in ("transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "saved" / file).read_bytes() == (base / file).read_bytes() or "config" in file
    assert "lineardit" not in (tmp_path / "saved" / "transformer" / "config.json").read_text()


def test_from_pretrained_runs_no_code_and_reads_no_pickle(base: Path, tmp_path: Path) -> None:
    save_adapter(student_of(base, "kernels"), tmp_path / "adapter")
    weights = base / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match=r"contains pickles \(.bin\), but only safetensors files are loaded"):
        from_pretrained(tmp_path / "adapter")
    for option in ("use_safetensors", "trust_remote_code", "custom_pipeline", "torch_dtype", "local_files_only"):
        with pytest.raises(ValueError, match=f"{option} is not supported"):
            from_pretrained(tmp_path / "adapter", **{option: False})


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["whole", "shards"])
def test_from_pretrained_loads_the_only_variant(
    base: Path, tmp_path: Path, shards: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    student, arguments = student_of(base, "lora"), inputs_of("flux")
    student.save_pretrained(tmp_path / "saved", variant="fp16", **shards)
    save_adapter(student, tmp_path / "adapter")
    variant_base = tmp_path / "base of a variant"
    plain(base).save_pretrained(variant_base, variant="fp16", **shards)
    with caplog.at_level(logging.INFO, logger="lineardit"):
        for pipe in (from_pretrained(tmp_path / "saved"), from_pretrained(tmp_path / "adapter", base=variant_base)):
            assert torch.equal(run(pipe, arguments), run(student, arguments))
    assert "loading the variant fp16, the only one available" in caplog.text
    plain(base).save_pretrained(variant_base, variant="bf16", **shards)
    with pytest.raises(ValueError, match="several variants, bf16, fp16: pass one of them as variant="):
        from_pretrained(tmp_path / "adapter", base=variant_base)
    assert torch.equal(
        run(from_pretrained(tmp_path / "adapter", base=variant_base, variant="fp16"), arguments),
        run(student, arguments),
    )
    shutil.rmtree(variant_base)
    plain(base).save_pretrained(variant_base, variant="fp16", **shards)
    assert stored_dtype(read_base(variant_base), variant="fp16") == torch.float32
    assert from_pretrained(tmp_path / "adapter", base=variant_base, dtype="auto").transformer.dtype == torch.float32


def test_from_pretrained_passes_options_to_diffusers(base: Path, tmp_path: Path) -> None:
    student = student_of(base, "kernels")
    save_adapter(student, tmp_path / "adapter")
    for option in ({"variant": "fp16"}, {"variant": None}):
        plain(base).save_pretrained(base, **option)
    with torch.no_grad():
        changed = plain(base)
        changed.transformer.proj_out.weight.zero_()
        changed.save_pretrained(base, variant="fp16")
    assert from_pretrained(tmp_path / "adapter").transformer.proj_out.weight.any()
    assert not from_pretrained(tmp_path / "adapter", variant="fp16").transformer.proj_out.weight.any()
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    assert from_pretrained(tmp_path / "adapter", scheduler=scheduler).scheduler is scheduler


def test_from_pretrained_refuses_a_base_folder_without_weights(base: Path, tmp_path: Path) -> None:
    student = student_of(base, "kernels")
    save_adapter(student, tmp_path / "adapter")
    (base / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"base/transformer has a config but no weights, .*--base"):
        from_pretrained(tmp_path / "adapter")
    assert from_pretrained(tmp_path / "adapter", weights=False).transformer.device.type == "meta"
    assert swapped(from_pretrained(tmp_path / "adapter", transformer=build("flux")).transformer)


def test_from_pretrained_refuses_unconverted_and_empty_folders(base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"is an unconverted base .*: pipe = diffusers.FluxPipeline.from_pretrained.*generate"
    ):
        from_pretrained(base)
    with pytest.raises(ValueError, match=r"is an unconverted base") as caught:
        from_pretrained(base / "transformer")
    typed: dict[str, Any] = {"diffusers": diffusers, "lineardit": lineardit}
    lines = re.findall(r"Convert it in memory: (pipe = .*); (lineardit\.linearize_\(pipe\))\. Or ", str(caught.value))
    exec("\n".join(lines[0]), typed)
    assert swapped(typed["pipe"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"has no model_index.json or config.json, and no lineardit.json as an adapter would"
    ):
        from_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="nothing is neither a local folder nor a Hub id"):
        from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize("read", [from_pretrained, open_pipeline, inspect_base, WeightlessConversion.read])
@pytest.mark.parametrize("conversion", [None, Clear(radius=2)], ids=["base", "saved"])
def test_base_argument_is_refused_for_a_whole_model(
    base: Path, conversion: Clear | None, read: Callable[..., Any], tmp_path: Path
) -> None:
    pipe = flux_pipeline()
    if conversion is not None:
        linearize_(pipe, conversion)
    pipe.save_pretrained(tmp_path / "whole")
    with pytest.raises(
        ValueError, match=r"base \(--base\) is for adapters only, but .*/whole is a complete model: omit it"
    ):
        read(tmp_path / "whole", base=base)


def test_open_pipeline_refuses_a_bare_denoiser(base: Path, tmp_path: Path) -> None:
    denoiser = base / "transformer"
    save_adapter(student_of(base, "kernels"), tmp_path / "adapter")
    for source, options in ((denoiser, {}), (tmp_path / "adapter", {"base": denoiser})):
        with pytest.raises(
            ValueError, match=r"base/transformer is only a denoiser, which cannot generate images: pass"
        ):
            open_pipeline(source, **options)
    assert swapped(from_pretrained(tmp_path / "adapter", base=denoiser))


def test_from_pretrained_refuses_an_unnamed_base_and_a_config_file(base: Path, tmp_path: Path) -> None:
    pipe = flux_pipeline()
    linearize_(pipe, Clear(radius=2))
    save_adapter(pipe, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"does not name its base .*pass base="):
        from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is a config without weights"):
        from_pretrained(tmp_path / "adapter", base=base / "transformer" / "config.json")


def test_saved_conversion_without_its_trained_weights_is_refused(base: Path, kind: str, tmp_path: Path) -> None:
    student_of(base, kind).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if ".lineardit_lora." not in name}
    if kind != "lora":
        tensors = {
            name: tensor for name, tensor in tensors.items() if not name.endswith("0.attn.linear_kernel.pool_weight")
        }
    save_file(tensors, file)
    expected = (
        "is missing the LoRA" if kind == "lora" else "do not fit this model; 2 missing: .*linear_kernel.pool_weight"
    )
    with pytest.raises(ValueError, match=expected):
        from_pretrained(tmp_path / "saved")


def test_conversion_saved_with_a_user_lora_is_refused(base: Path, kind: str, tmp_path: Path) -> None:
    student = student_of(base, kind)
    student.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="style")
    student.save_pretrained(tmp_path / "saved")
    with pytest.raises(
        ValueError, match="saved with an additional LoRA loaded: unload that LoRA and save the model again"
    ):
        from_pretrained(tmp_path / "saved")


def test_load_adapter_failure_keeps_an_earlier_conversion(base: Path, tmp_path: Path) -> None:
    save_adapter(student_of(base, "kernels"), tmp_path / "adapter")
    pipe, arguments = student_of(base, "lora"), inputs_of("flux")
    before = run(pipe, arguments)
    with pytest.raises(ValueError, match="no impl 'bogus'"):
        load_adapter_(pipe, tmp_path / "adapter", impl="bogus")
    assert torch.equal(run(pipe, arguments), before)
