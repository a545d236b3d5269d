"""Quantized bases: attention and LoRA only call the projections, so they work; whole weights are refused."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_pipelines import flux_pipeline
from torch import nn
from trained import train_full_

from lineardit import Clear, dense, from_pretrained, linearize_, load_adapter_, restore_, save_adapter
from lineardit.linearize.weights.training import add_lora_
from tiny_models import build, inputs_of, run

SMALL = Clear(radius=1.5)


def _model() -> Any:
    """Layers of 64 features, the block size of bitsandbytes."""
    config = {**build("flux").config, "attention_head_dim": 32, "axes_dims_rope": (8, 8, 16)}
    return diffusers.FluxTransformer2DModel.from_config(config).eval()


def _torchao(folder: Path) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    config = diffusers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return diffusers.FluxTransformer2DModel.from_pretrained(folder, quantization_config=config)


def _bitsandbytes(folder: Path, kind: str) -> nn.Module:
    """diffusers loads these on GPUs only; the layers themselves also run on a CPU."""
    layers = pytest.importorskip("bitsandbytes.nn")
    model = diffusers.FluxTransformer2DModel.from_pretrained(folder)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in ("to_q", "to_k", "to_v"):
            options: dict[str, Any] = {"quant_type": "nf4"} if kind == "Linear4bit" else {"has_fp16_weights": False}
            quantized = getattr(layers, kind)(layer.in_features, layer.out_features, **options)
            quantized.load_state_dict(layer.state_dict())
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, quantized.to("cpu"))
    return model


def _gguf(folder: Path) -> nn.Module:
    """With layers as diffusers makes them from a GGUF file."""
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    model = diffusers.FluxTransformer2DModel.from_pretrained(folder)
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in ("to_q", "to_k", "to_v"):
            quantized = GGUFLinear(layer.in_features, layer.out_features, compute_dtype=torch.float32)
            packed = torch.from_numpy(gguf.quantize(layer.weight.detach().numpy(), kind))
            quantized.weight, quantized.bias = GGUFParameter(packed, quant_type=kind), layer.bias
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, quantized)
    return model


BASES = {
    "torchao": _torchao,
    "bitsandbytes 4 bits": lambda folder: _bitsandbytes(folder, "Linear4bit"),
    "GGUF": _gguf,
    "bitsandbytes 8 bits": lambda folder: _bitsandbytes(folder, "Linear8bitLt"),
}


def test_from_pretrained_quantizes_the_base(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    config = diffusers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    given = diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": config})
    pipe, arguments = flux_pipeline(), inputs_of("flux")
    pipe.save_pretrained(tmp_path / "base")
    linearize_(pipe, SMALL)
    save_adapter(pipe, tmp_path / "adapter")
    loaded: Any = from_pretrained(tmp_path / "adapter", base=tmp_path / "base", quantization_config=given)
    assert type(loaded.transformer.transformer_blocks[0].attn.to_q.weight) is not nn.Parameter
    expected = run(pipe.transformer, arguments)
    assert torch.allclose(run(loaded.transformer, arguments), expected, atol=0.2 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", BASES)
def test_quantized_bases_support_the_window_and_lora(kind: str, tmp_path: Path) -> None:
    plain, arguments = _model(), inputs_of("flux")
    plain.save_pretrained(tmp_path / "base")
    model: Any = BASES[kind](tmp_path / "base").eval()
    assert type(model.transformer_blocks[0].attn.to_q.weight) is not nn.Parameter
    for one in (plain, model):
        linearize_(one, SMALL)
    expected, windowed = run(plain, arguments), run(model, arguments)
    assert torch.allclose(windowed, expected, atol=0.2 * float(expected.abs().max()))
    linearize_(model, Clear(radius=20))
    with dense(model):
        base = run(model, arguments)
    assert torch.equal(run(model, arguments), base)

    trained = add_lora_(plain, rank=2)
    with torch.no_grad():
        for factor in trained.values():
            factor.normal_(std=0.3)
    save_adapter(plain, tmp_path / "lora")
    load_adapter_(model, tmp_path / "lora")
    student = run(model, arguments)
    assert not torch.allclose(student, windowed, atol=1e-3)
    save_adapter(model, tmp_path / "again")
    restore_(model)
    assert torch.equal(run(model, arguments), base)
    load_adapter_(model, tmp_path / "again")
    assert torch.equal(run(model, arguments), student)
    restore_(model)

    linearize_(model, SMALL)
    with pytest.raises(ValueError, match="quantized bases support LoRA adapters only"):
        load_adapter_(model, tmp_path / "lora", keep_original=False)
    restore_(plain)
    linearize_(plain, SMALL)
    train_full_(plain, targets=("to_q",))
    save_adapter(plain, tmp_path / "full")
    # weights packed in 4 bits have another shape
    with pytest.raises(ValueError, match=r"quantized bases support LoRA adapters only|do not fit this model"):
        load_adapter_(model, tmp_path / "full")
    assert torch.equal(run(model, arguments), windowed)
