"""`--quantize`: a base in 8 or 4 bits, in the commands that generate pictures."""

import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from typed import lineardit

from lineardit.commands.prompts import parse_quantization
from lineardit.linearize.adapters.base import build_on_meta, read_base
from lineardit.linearize.adapters.opening import open_pipeline
from lineardit.linearize.adapters.quantization import BACKENDS, Quantization, cast_layerwise_
from lineardit.linearize.measures.attention_profile import read_profile
from lineardit.linearize.weights.quantized import quantized_types
from lineardit.pipelines.estimate import _bytes, weights_on_device
from lineardit.pipelines.placement import record_placement_

SCENE = "a red circle at the top left on striped sand"
SMALL = ("--steps", "1", "--max-sequence-length", "8", "--offline")
INT8 = ("--quantize", "torchao")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text(f"{SCENE}\n")
    return file


def metadata(picture: Path) -> dict[str, str]:
    with Image.open(picture) as image:
        return dict(image.info)


def test_pictures_record_the_quantization_of_their_model(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchao.quantization")
    out, large = tmp_path / "out.png", tmp_path / "large.png"
    command = ("generate", adapter, SCENE, "--size", "32x24", *SMALL, "-o", out)
    assert lineardit(*command, *INT8) == 0
    assert metadata(out)["quantize"] == "torchao"
    assert lineardit(*command) == 2
    assert "made with other settings" in capsys.readouterr().err
    assert lineardit("upscale", out, *SMALL, "--quantize", "torchao:quant_type=Int8WeightOnlyConfig", "-o", large) == 0
    assert metadata(large)["quantize"] == "torchao:quant_type=Int8WeightOnlyConfig"


def test_samples_record_the_quantization_of_their_teacher(
    base: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchao.quantization")
    command = ("prepare", base, "--prompts", prompts, "--size", "32x24", *SMALL, "-o", tmp_path / "samples")
    assert lineardit(*command, *INT8) == 0
    assert json.loads((tmp_path / "samples/index.json").read_text())["settings"]["quantized"] == "Int8Tensor"
    assert lineardit(*command) == 2
    assert "quantized was 'Int8Tensor', now None" in capsys.readouterr().err


def test_both_sides_of_an_evaluation_are_quantized(
    base: Path, adapter: Path, prompts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("torchao.quantization")
    command = ("evaluate", base, adapter, "--prompts", prompts, "--size", "32x24", *SMALL, "-o", tmp_path / "report")
    with caplog.at_level(logging.INFO):
        assert lineardit(*command, *INT8) == 0
    question = json.loads((tmp_path / "report/report.json").read_text())["question"]
    assert (question["teacher_quantization"], question["student_quantization"]) == ("torchao", "torchao")
    assert lineardit(*command, "--no-memory") == 2  # other weights are another evaluation


def test_quantizing_a_quantized_base_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchao.quantization")
    open_pipeline(base, quantization=Quantization(quant_backend="torchao")).save_pretrained(tmp_path / "base")
    assert lineardit("generate", tmp_path / "base", SCENE, *SMALL, *INT8, "-o", tmp_path / "out.png") == 2
    assert "is already quantized according to its config: omit" in capsys.readouterr().err


def test_weights_on_device_counts_quantized_weights_as_stored(base: Path) -> None:
    pytest.importorskip("torchao.quantization")
    plain, packed = open_pipeline(base), open_pipeline(base, quantization=Quantization(quant_backend="torchao"))
    linear = sum(layer.weight.numel() for layer in plain.transformer.modules() if isinstance(layer, nn.Linear))
    saved = weights_on_device(plain) - weights_on_device(packed)
    assert 2.8 * linear < saved < 3 * linear  # of 4 bytes each; scales take some


def test_weights_on_device_counts_a_planned_quantization(base: Path) -> None:
    pipe, plain = open_pipeline(base, weights=False), open_pipeline(base, weights=False)
    linear = sum(layer.weight.numel() for layer in pipe.transformer.modules() if isinstance(layer, nn.Linear))
    record_placement_(plain, torch.device("cpu"))
    record_placement_(pipe, torch.device("cpu"), quantization=Quantization(quant_backend="bitsandbytes_8bit"))
    assert weights_on_device(plain) - weights_on_device(pipe) == 3 * linear


def test_memory_of_quantized_flux_matches_the_documentation() -> None:
    base = read_base(Path(__file__).parents[1] / "data/flux1-dev")
    model = build_on_meta(base, dtype=torch.bfloat16)
    num_bytes = {kind: _bytes(model, None, bits=Quantization(quant_backend=kind).bits) for kind in BACKENDS}
    cast_layerwise_(model, Quantization(quant_backend="layerwise_casting"), torch.bfloat16)
    gib = {kind: round(count / 2**30, 1) for kind, count in num_bytes.items()} | {
        "cast": round(_bytes(model, None) / 2**30, 1)
    }
    assert gib == {
        "bitsandbytes_4bit": 6.2,
        "bitsandbytes_8bit": 11.1,
        "torchao": 11.1,
        "layerwise_casting": 22.2,  # until it is cast
        "cast": 14.1,
    }


def test_generate_supports_layerwise_casting(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    command = ("generate", adapter, SCENE, "--size", "32x24", *SMALL, "-o", out)
    assert lineardit(*command, "--quantize", "layerwise_casting:storage_dtype=float8_e5m2") == 0
    assert metadata(out)["quantize"] == "layerwise_casting:storage_dtype=float8_e5m2"
    uncast, cast = (
        open_pipeline(base),
        open_pipeline(base, quantization=Quantization(quant_backend="layerwise_casting")),
    )
    planned = open_pipeline(base, weights=False, quantization=Quantization(quant_backend="layerwise_casting"))
    assert quantized_types(cast.transformer) == "float8_e4m3fn"
    assert weights_on_device(planned) == weights_on_device(cast) < weights_on_device(uncast)
    assert lineardit(*command, "--quantize", "layerwise_casting:storage=float8_e5m2", "--overwrite") == 2
    assert "layerwise_casting takes storage_dtype" in capsys.readouterr().err


def test_parse_quantization_inverts_str() -> None:
    text = "bitsandbytes_4bit:bnb_4bit_use_double_quant=true,bnb_4bit_quant_type=fp4"
    quantization = parse_quantization(text)
    assert quantization == Quantization(
        quant_backend="bitsandbytes_4bit",
        quant_kwargs={"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "fp4"},
    )
    assert str(quantization) == text
    assert parse_quantization(None) is None


def test_parse_quantization_accepts_a_list() -> None:
    text = 'bitsandbytes_8bit:llm_int8_skip_modules=["proj_out", "norm_out"],llm_int8_threshold=5.0'
    quantization = parse_quantization(text)
    assert quantization is not None
    assert quantization.quant_kwargs == {"llm_int8_skip_modules": ["proj_out", "norm_out"], "llm_int8_threshold": 5.0}
    assert parse_quantization(str(quantization)) == quantization


def test_figures_record_the_quantization(
    base: Path, adapter: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchao.quantization")
    out, common = tmp_path / "out", ("--prompts", prompts, "--size", "32x24", *SMALL, *INT8)
    assert lineardit("nearness", base, adapter, *common, "-o", out) == 0
    assert "of one prediction; weights by torchao\n" in capsys.readouterr().out
    content = json.loads((out / "nearness.json").read_text())
    assert content["quantization"] == "torchao"
    assert content["models"][str(base)]["mean"] == 0 < content["models"][str(adapter)]["mean"]
    assert lineardit("profile", base, *common, "--radii", "2", "-o", out) == 0
    assert "mean over heads; weights by torchao\n" in capsys.readouterr().out
    assert read_profile(out / "profile.json").quantized == "Int8Tensor"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torchao:", r"must be BACKEND\[:NAME=VALUE,\.\.\.\].*got 'torchao:'"),
        ("torchao:quant_type", "got 'torchao:quant_type'"),
        ("bitsandbytes_8bit:llm_int8_skip_modules=proj_out,norm_out", r"a list as in TOML, such as .*\[.*got 'bits"),
        ("bitsandbytes_8bit:llm_int8_skip_modules=[proj_out,norm_out]", r"a list as in TOML, such as .*\[.*got 'bits"),
        ("torchao:group_size=32,group_size=64", "each name once"),
        ("torchaoo", r"quant_backend must be .*got 'torchaoo' \(did you mean torchao\?\)"),
    ],
)
def test_parse_quantization_refuses_misspellings(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_quantization(text)
