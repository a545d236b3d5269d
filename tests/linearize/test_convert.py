"""Layer selection, reports, the config entry, and refusals of `linearize_` and related functions."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lineardit.linearize import (
    Clear,
    Family,
    ForwardLayout,
    SwapReport,
    UnsupportedModelError,
    dense,
    linearize_,
    restore_,
    set_impl_,
    swapped,
)
from lineardit.linearize.networks import denoiser
from tiny_models import FAMILIES, MODELS, build, inputs_of, run

SMALL = Clear(radius=2.3)


@pytest.mark.parametrize("family", FAMILIES)
def test_linearize_reports_every_attention_module(family: str) -> None:
    model = build(family)
    report = linearize_(model, SMALL, impl="tiled")
    assert set(report.swapped) == set(swapped(model))
    assert set(report.swapped.values()) == {SMALL}
    count = MODELS[family].num_attention
    assert len(report.swapped) == count
    assert str(report).startswith(f"{count}/{count} self-attention modules: ")
    attention_modules = {name for name, module in model.named_modules() if hasattr(module, "get_processor")}
    assert report.swapped.keys() | report.skipped.keys() == attention_modules
    assert set(report.skipped.values()) <= {"cross-attention", "not an image self-attention of this family"}
    assert report.impl == "tiled"


def test_linearize_layers_and_patterns_select_modules() -> None:
    model = build("flux", num_layers=2)
    report = linearize_(model, SMALL, layers="single_*")
    assert list(report.swapped) == [f"single_transformer_blocks.{i}.attn" for i in range(2)]
    assert report.skipped == {f"transformer_blocks.{i}.attn": "not matched by 'single_*'" for i in range(2)}
    assert str(report).startswith("2/4 self-attention modules: 2 x Clear(radius=2.3) (family flux, impl auto; left: 2 ")

    wide = Clear(radius=4, pool_tokens=8)
    report = linearize_(model, {"transformer_blocks.*": SMALL, "single_*.1.attn": wide})
    assert list(report.swapped.values()) == [SMALL, SMALL, wide]
    assert {name: module.linear_kernel.config for name, module in swapped(model).items()} == report.swapped

    report = linearize_(model, {"*": SMALL}, layers=["*.0.attn", "transformer_blocks.*"])
    assert len(report.swapped) == 3


@pytest.mark.parametrize(
    ("config", "layers", "message"),
    [
        (
            SMALL,
            "single_transformer_block.*",
            "matches no self-attention module; near names: single_transformer_blocks",
        ),
        ({"tranformer_blocks.0.attn": SMALL}, None, "near names: transformer_blocks.0.attn"),
        ({"*": SMALL, "single_*": SMALL}, None, "two patterns match single_transformer_blocks.0.attn"),
        ({}, None, "nothing to convert: the mapping of patterns"),
        ({"single_*": SMALL}, "transformer_blocks.*", "matches no self-attention module"),
        (SMALL, [], r"layers must be None \(all\), a glob of module names, or a list of them, got \[\]"),
        (SMALL, 3, "layers must be None"),
        (4, None, "expected a method config"),
        ({"*": {"radius": 4}}, None, "expected a method config"),
        (Clear, None, "expected a method config"),
    ],
)
def test_linearize_refuses_invalid_layer_choices_and_changes_nothing(
    config: object, layers: object, message: str
) -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, SMALL)
    out = run(model, arguments)
    with pytest.raises(ValueError, match=message):
        linearize_(model, config, layers=layers)
    assert torch.equal(run(model, arguments), out)
    assert len(swapped(model)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "flux"}, r"family must be a lineardit\.linearize\.Family or None, got 'flux'"),
        ({"min_tokens": "64"}, "min_tokens must be an integer >= 0, got '64'"),
        ({"dense_below": 0.5}, "dense_below must be an integer >= 0, got 0.5"),
    ],
)
def test_linearize_error_names_an_argument_of_the_wrong_type(arguments: dict[str, Any], message: str) -> None:
    model = build("flux")
    with pytest.raises(ValueError, match=message):
        linearize_(model, SMALL, **arguments)
    assert not swapped(model)


def test_linearize_takes_pipelines_compiled_models_and_subclasses() -> None:
    model = build("flux")
    assert denoiser(SimpleNamespace(transformer=model, vae=nn.Linear(1, 1))) == ("transformer", model)
    assert denoiser(SimpleNamespace(transformer=None, unet=model)) == ("unet", model)
    assert denoiser(torch.compile(model)) == ("transformer", model)
    linearize_(SimpleNamespace(transformer=model), SMALL)
    model.__class__ = type("MyFlux", (type(model),), {})
    restore_(model)
    assert linearize_(model, SMALL).family == "flux"


@pytest.mark.parametrize("target", [nn.Linear(2, 2), SimpleNamespace(vae=None), "black-forest-labs/FLUX.1-dev"])
def test_linearize_refuses_unknown_models(target: object) -> None:
    with pytest.raises(UnsupportedModelError, match=r"FluxTransformer2DModel|expected a pipeline"):
        linearize_(target, SMALL)


def test_unconverted_models_are_refused() -> None:
    model = build("flux")
    with pytest.raises(ValueError, match="not converted"):
        restore_(model)
    with pytest.raises(ValueError, match="not converted"), dense(model):
        pass
    with pytest.raises(ValueError, match="not converted"):
        set_impl_(model, "tiled")


def test_unknown_implementations_are_refused() -> None:
    model = build("flux")
    with pytest.raises(ValueError, match=r"no impl 'tilde' \(did you mean tiled\?\); choose from: auto, reference,"):
        linearize_(model, SMALL, impl="tilde")
    assert not swapped(model)
    linearize_(model, SMALL)
    with pytest.raises(ValueError, match="no impl 'flash'"):
        set_impl_(model, "flash")


def test_save_pretrained_records_the_conversion_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build("flux")
    linearize_(model, SMALL)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="lineardit"):
        model.save_pretrained(tmp_path)
    assert sum("save_adapter" in record.getMessage() for record in caplog.records) == 1
    saved = type(model).load_config(tmp_path)
    assert saved["lineardit"]["methods"] == {"*": {"method": "clear", "radius": 2.3}}
    restore_(model)
    model.save_pretrained(tmp_path)
    assert "lineardit" not in type(model).load_config(tmp_path)


def test_kernel_weights_are_real_and_trainable_parameters() -> None:
    model = build("flux")
    linearize_(model, Clear(radius=2, pool_size=2))
    names = [name for name, _ in model.named_parameters() if ".linear_kernel." in name]
    assert names == [
        "transformer_blocks.0.attn.linear_kernel.pool_weight",
        "single_transformer_blocks.0.attn.linear_kernel.pool_weight",
    ]
    model(**inputs_of("flux")).sample.square().sum().backward()
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in names)
    with torch.device("meta"):
        empty = build("flux")
    linearize_(empty, Clear(radius=2, pool_size=2))
    assert all(empty.get_parameter(name).device.type == "cpu" for name in names)


class _OwnAttention(nn.Module):
    heads, inner_dim = 2, 8

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(8, 24)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query, key, value = self.to_qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class _OwnModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = _OwnAttention()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layer(image.flatten(2).transpose(1, 2))


def _read_own(model: nn.Module, arguments: dict) -> ForwardLayout:
    return ForwardLayout(grid=tuple(arguments["image"].shape[-2:]))


def test_linearize_accepts_a_custom_family() -> None:
    family = Family(name="own", attention=("layer",), read_layout=_read_own)
    model, image = _OwnModel(), torch.randn(2, 8, 5, 7)
    base = model(image)
    report = linearize_(model, Clear(radius=20), family=family)
    assert isinstance(report, SwapReport)
    assert report.family == "own"
    assert torch.equal(model(image), base)
    linearize_(model, SMALL, family=family)
    far = image.clone()
    far[..., 4, 6] += 1
    changed = (model(far) - model(image)).abs().amax((0, 2)).view(5, 7) > 0
    assert changed.sum() == 8  # a quarter of the window of radius 2.3, at the corner
    restore_(model)
    assert torch.equal(model(image), base)
