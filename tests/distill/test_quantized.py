"""LoRA on a frozen base in 8 or 4 bits: training, and which settings are read and refused."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxPipeline
from tiny_distill import PROMPTS, SIZES, build_tiny, launch_run, loss_rows, table, trained_weights, write_config
from torch import nn

from lineardit import from_pretrained
from lineardit.distill import train
from lineardit.distill.config import DistillConfig
from lineardit.distill.config_tables import config_from_tables, config_to_tables, load_config
from lineardit.distill.evaluate import ByName, evaluate
from lineardit.distill.identity import fingerprint
from lineardit.distill.pictures import PictureSettings
from lineardit.distill.prepare import prepare
from lineardit.distill.student import build_student_
from lineardit.distill.train import distill, load_teacher
from lineardit.linearize.adapters import quantization as quantizing
from lineardit.linearize.adapters.base import read_base
from lineardit.linearize.adapters.loading import load_base
from lineardit.linearize.adapters.quantization import Quantization, quantization_options

MakeConfig = Callable[..., DistillConfig]
INT8 = {"quant_backend": "torchao", "quant_kwargs": {"quant_type": "Int8WeightOnlyConfig"}}


def _torchao() -> None:
    pytest.importorskip("torchao.quantization")


def test_run_on_a_quantized_base_is_resumed_and_evaluated(
    make_config: MakeConfig, tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _torchao()
    tables: dict[str, Any] = {"base": {"quantization": INT8}, "validate": {"samples": 2, "every": 4}}
    config = make_config(**tables, run={"gradient_checkpointing": True})
    with caplog.at_level(logging.INFO):
        distill(config)
    assert "quantized" in caplog.text
    assert "other weights" not in caplog.text
    run, expected = config.run.folder, trained_weights(config.run.folder)
    assert loss_rows(run)[-1]["attention"] < loss_rows(run)[0]["attention"]
    assert [row["step"] for row in table(run / "validation.csv")] == [4, 6]
    distill(config, resume=4)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_weights(run).items())
    with pytest.raises(ValueError, match=r"base.quantization.quant_backend was 'torchao', now None"):
        distill(make_config(validate=tables["validate"]), resume="latest")

    saved = FluxPipeline.from_pretrained(base, torch_dtype=torch.float32, quantization_config=_int8()).transformer
    assert fingerprint(saved) == fingerprint(load_teacher(config.base).transformer) != fingerprint(_plain(base))
    loaded = from_pretrained(run / "adapter", quantization_config=_int8())  # compared with unquantized weights
    settings = PictureSettings(height=32, width=24, steps=1, max_sequence_length=8)
    unquantized = ByName(name=str(run / "adapter"))
    report = evaluate(loaded, unquantized, PROMPTS[:1], tmp_path / "report", settings=settings, memory=False)
    assert 0 < report.latent_mse < 0.01


def _int8() -> diffusers.PipelineQuantizationConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return diffusers.PipelineQuantizationConfig(
        quant_mapping={"transformer": diffusers.TorchAoConfig(Int8WeightOnlyConfig())}
    )


def _plain(base: Path) -> nn.Module:
    return FluxPipeline.from_pretrained(base).transformer


@pytest.mark.slow
def test_quantized_base_gives_the_same_losses_in_two_processes(make_config: MakeConfig, tmp_path: Path) -> None:
    _torchao()
    configs = [
        make_config(base={"quantization": INT8}, run={"steps": 3, "directory": str(tmp_path / name)}) for name in "ab"
    ]
    process = launch_run(write_config(configs[1], tmp_path / "b.toml"), processes=2)
    distill(configs[0])
    assert process.wait() == 0, process.stderr.read().decode()
    rows = [[row["loss"] for row in loss_rows(config.run.folder)] for config in configs]
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)


def test_base_saved_quantized_needs_no_setting(make_config: MakeConfig, tmp_path: Path, base: Path) -> None:
    """It generates samples, is distilled from them, and loads the adapter."""
    _torchao()
    pipe = FluxPipeline.from_pretrained(base, torch_dtype=torch.float32, quantization_config=_int8())
    pipe.save_pretrained(tmp_path / "base")
    samples = prepare(pipe, PROMPTS[:4], tmp_path / "samples", sizes=SIZES[:1], steps=1, max_sequence_length=8)
    named: dict[str, Any] = {"base": {"model": str(tmp_path / "base")}, "data": {"directory": str(samples)}}
    adapter = distill(make_config(**named, run={"steps": 1}))
    assert type(from_pretrained(adapter).transformer.proj_out.weight) is not nn.Parameter
    with pytest.raises(ValueError, match=r"to_q must be an nn.Linear to be trained, got a Linear with a Int8Tensor"):
        build_student_(load_teacher(make_config(**named).base), make_config(**named, trained={"kind": "attention"}))


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_lora_trains_on_bitsandbytes_layers(
    kind: str,
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """diffusers loads them on GPUs only, but the layers themselves also run on a CPU."""
    layers = pytest.importorskip("bitsandbytes.nn")
    pipe = build_tiny()
    wide = {**pipe.transformer.config, "attention_head_dim": 32, "axes_dims_rope": (8, 8, 16)}  # 64 wide, as nf4 blocks
    pipe.register_modules(transformer=diffusers.FluxTransformer2DModel.from_config(wide).eval())
    pipe.save_pretrained(tmp_path / "base")
    samples = prepare(pipe, PROMPTS[:4], tmp_path / "samples", sizes=SIZES[:1], steps=1, max_sequence_length=8)
    load = train.load_base

    def packed(*arguments: Any, **options: Any) -> Any:
        pipe = load(*arguments, **options)
        for name, layer in list(pipe.transformer.named_modules()):
            if type(layer) is nn.Linear and name.rpartition(".")[2] in ("to_q", "to_k", "to_v"):
                kinds: dict[str, Any] = {"quant_type": "nf4"} if kind == "Linear4bit" else {"has_fp16_weights": False}
                quantized = getattr(layers, kind)(layer.in_features, layer.out_features, **kinds)
                quantized.load_state_dict(layer.state_dict())
                quantized.support_avx512bf16_for_cpu = False  # otherwise packed for inference only
                parent, _, attribute = name.rpartition(".")
                setattr(pipe.transformer.get_submodule(parent), attribute, quantized.to("cpu"))
        return pipe

    monkeypatch.setattr(train, "load_base", packed)
    named: dict[str, Any] = {"base": {"model": str(tmp_path / "base")}, "data": {"directory": str(samples)}}
    config = make_config(**named, loss={"flow": 0.0}, run={"batch_size": 2})
    with caplog.at_level(logging.INFO):
        adapter = distill(config)
    total = sum(weight.numel() for weight in pipe.transformer.parameters())
    trained = sum(weight.numel() for weight in trained_weights(config.run.folder).values())
    assert f"{trained:,} of {total + trained:,} parameters" in caplog.text
    rows = loss_rows(config.run.folder)
    assert rows[-1]["attention"] < rows[0]["attention"]
    from_pretrained(adapter)
    with pytest.raises(ValueError, match=rf"to_q must be an nn.Linear to be trained, got a {kind}"):
        build_student_(load_teacher(config.base), make_config(**named, trained={"kind": "attention"}))


def test_lora_trains_with_layerwise_casting(make_config: MakeConfig, tmp_path: Path, base: Path) -> None:
    """Needs no extra package; trained weights stay in float32, gradients are those of the rounded weights."""
    casting = {"quant_backend": "layerwise_casting"}
    samples = tmp_path / "samples"
    pipe = load_base(read_base(base), dtype=torch.bfloat16, quantization=Quantization(**casting))
    prepare(pipe, PROMPTS[:4], samples, sizes=SIZES[:1], steps=1, max_sequence_length=8, calls=1)
    tables: dict[str, Any] = {"data": {"directory": str(samples)}, "loss": {"flow": 0.0}}
    run = {"gradient_checkpointing": True, "mixed_precision": "bf16", "batch_size": 2}
    distill(make_config(**tables, base={"dtype": "bfloat16", "quantization": casting}, run=run))
    trained = trained_weights(tmp_path / "run")
    assert all(tensor.dtype == torch.float32 for tensor in trained.values())
    assert not all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in trained.values())
    with pytest.raises(ValueError, match=r"^run.gradient_checkpointing must be true if base.quantization is layer"):
        make_config(base={"quantization": casting})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"storage_dtype": "int8"}, r"storage_dtype must be float8_e4m3fn or float8_e5m2, got 'int8'"),
        ({"dtype": "float8_e5m2"}, r"unknown quant_kwargs dtype; layerwise_casting takes storage_dtype"),
    ],
)
def test_arguments_of_layerwise_casting_are_checked(kwargs: dict[str, Any], message: str, base: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_base(read_base(base), quantization=Quantization(quant_backend="layerwise_casting", quant_kwargs=kwargs))


def test_quantization_without_gradients_is_refused(make_config: MakeConfig) -> None:
    _torchao()
    dynamic = INT8 | {"quant_kwargs": {"quant_type": "Int8DynamicActivationInt8WeightConfig"}}
    with pytest.raises(ValueError, match=r"no gradient passes through .*, whose weight is a Int8Tensor: use a kind of"):
        distill(make_config(base={"quantization": dynamic}))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"modules_to_not_convert": 3}, r"modules_to_not_convert must be module names, got 3"),
        (
            {"modules_to_not_convert": ["proj_out", "to_qq"]},
            r"names 'to_qq', but this Flux.* has no Linear layer .* .did you mean to_q, .*; its layers are",
        ),
        ({"quant_type": None}, r"quant_type must be one of .*Int8WeightOnlyConfig.*; got None"),
        ({"quant_type": "Int8WeightOnly"}, r"got 'Int8WeightOnly' \(did you mean Int8WeightOnlyConfig"),
        (
            {"quant_type": "Float8WeightOnlyConfig", "weight_dtyp": "x"},
            r"base.quantization .*: unknown quant_kwargs weight_dtyp \(did you mean weight_dtype\?\); Float8W",
        ),
        ({"quant_type": "Float8WeightOnlyConfig", "weight_dtype": "float9"}, r"quant_kwargs: .*float9"),
        (
            {"quant_type": "Int8WeightOnlyConfig", "version": 7},
            r"base.quantization .*: quant_kwargs: |failed: ",
        ),
    ],
)
def test_arguments_of_torchao_are_checked(kwargs: dict[str, Any], message: str, make_config: MakeConfig) -> None:
    _torchao()
    with pytest.raises(ValueError, match=message):
        load_teacher(make_config(base={"quantization": INT8 | {"quant_kwargs": kwargs}}).base)


def test_missing_requirement_of_a_backend_is_reported(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    _torchao()

    def raise_missing(*_: Any, **__: Any) -> None:
        raise ImportError("Requires mslk >= 1.0.0")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", raise_missing)
    with pytest.raises(ValueError, match=r"^base.quantization \(--quantize\) failed: Requires mslk >= 1.0.0"):
        load_teacher(make_config(base={"quantization": INT8}).base)


def test_arguments_of_torchao_may_name_dtypes(make_config: MakeConfig) -> None:
    _torchao()
    kwargs = {
        "quant_type": "Float8WeightOnlyConfig",
        "weight_dtype": "float8_e5m2",
        "modules_to_not_convert": ["proj_out"],
    }
    model = load_teacher(make_config(base={"quantization": INT8 | {"quant_kwargs": kwargs}}).base).transformer
    assert model.transformer_blocks[0].attn.to_q.weight.qdata.dtype == torch.float8_e5m2
    assert type(model.proj_out.weight) is nn.Parameter


def test_arguments_of_bitsandbytes_are_checked(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def options(backend: str, **kwargs: Any) -> Any:
        quantization = Quantization(quant_backend=backend, quant_kwargs=kwargs)
        config = quantization_options(quantization, read_base(base), torch.float32)["quantization_config"]
        return config.quant_mapping["transformer"]

    monkeypatch.setattr(quantizing, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes, which is not installed: pip install bitsandbytes$"):
        options("bitsandbytes_4bit")
    monkeypatch.setattr(quantizing, "find_spec", lambda _: True)
    with pytest.raises(ValueError, match="diffusers quantizes with bitsandbytes on GPUs only; torchao"):
        options("bitsandbytes_4bit")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(diffusers.BitsAndBytesConfig, "post_init", lambda _: None)  # which needs the package
    four, eight = options("bitsandbytes_4bit", bnb_4bit_use_double_quant=True), options("bitsandbytes_8bit")
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_compute_dtype) == (True, "nf4", torch.float32)
    assert four.bnb_4bit_use_double_quant
    assert (eight.load_in_8bit, eight.load_in_4bit) == (True, False)
    with pytest.raises(ValueError, match=r"quant_kwargs bnb_quant_type \(did you mean bnb_4bit_quant_type"):
        options("bitsandbytes_4bit", bnb_quant_type="nf4")
    with pytest.raises(ValueError, match=r"quant_kwargs: .*bfloat61"):
        options("bitsandbytes_4bit", bnb_4bit_compute_dtype="bfloat61")


def test_quantization_settings_round_trip(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(base={"quantization": INT8})
    assert config.base.quantization == Quantization(**INT8)
    assert config_from_tables(config_to_tables(config)) == config
    assert load_config(write_config(config, tmp_path / "config.toml")) == config


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ("torchao", "base.quantization must be a table, got 'torchao'"),
        ({"quant_backend": "gguf"}, "base.quantization .*: quant_backend must be bitsandbytes_4bit or .*, got 'gguf'"),
        ({"backend": "torchao"}, r"unknown setting base.quantization.backend; did you mean .*quant_backend\?"),
        (INT8 | {"quant_kwargs": 3}, "base.quantization.quant_kwargs must be a table, got 3"),
    ],
)
def test_quantization_settings_are_checked(quantization: Any, message: str, make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make_config(base={"quantization": quantization})


def test_training_quantized_projections_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"^trained.kind must be lora if base.quantization is set, got 'attention'"):
        make_config(base={"quantization": INT8}, trained={"kind": "attention"})
