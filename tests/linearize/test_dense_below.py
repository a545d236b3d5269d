"""`linearize_(..., dense_below=N)`: the original attention for small images, unless weights were trained."""

import json
import logging
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import flux_pipeline, saved_flux_pipeline
from torch import Tensor, nn
from trained import train_full_

from lineardit import (
    Clear,
    LinFusion,
    Neighborhood,
    dense,
    from_pretrained,
    linearize_,
    load_adapter_,
    restore_,
    save_adapter,
    save_merged,
    set_impl_,
)
from lineardit.linearize.adapters.conversion import convert_and_merge, convert_base
from lineardit.linearize.adapters.manifest import read_entry, read_manifest
from lineardit.linearize.adapters.model_card import adapter_card
from lineardit.linearize.convert import swapped
from lineardit.linearize.describe import (
    count_implementations,
    describe_attention,
    describe_implementations,
    swap_report,
)
from lineardit.linearize.measures.inspection import inspect_base
from lineardit.linearize.weights.training import add_lora_
from tiny_models import FAMILIES, build, inputs_of, run

SMALL = Clear(radius=1.5)
UNUSED = "dense_below=1000 is ignored"
MANIFEST = "lineardit.json"


def base(family: str = "flux") -> nn.Module:
    torch.manual_seed(1)
    return build(family)


def tokens(model: nn.Module) -> dict[str, int]:
    """Image tokens in the last call of each converted module."""
    modules: dict[str, Any] = swapped(model)
    return {name: prod(module._lineardit_level.grid) for name, module in modules.items()}


def converted_run(family: str, **options: Any) -> Tensor:
    model = base(family)
    linearize_(model, SMALL, **options)
    return run(model, inputs_of(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_below_runs_the_original_attention_only_below_the_limit(family: str) -> None:
    model, arguments = base(family), inputs_of(family)
    original = run(model, arguments)
    linearize_(model, SMALL)
    converted, counts = run(model, arguments), tokens(model).values()
    assert not torch.equal(converted, original)
    linearize_(model, SMALL, dense_below=max(counts) + 1)
    assert torch.equal(run(model, arguments), original)
    linearize_(model, SMALL, dense_below=min(counts))
    assert torch.equal(run(model, arguments), converted)
    restore_(model)
    assert torch.equal(run(model, arguments), original)


def test_dense_below_applies_to_each_unet_level_separately() -> None:
    model, arguments = base("unet"), inputs_of("unet")
    linearize_(model, SMALL)
    run(model, arguments)
    counts = tokens(model)
    large = max(counts.values())
    assert min(counts.values()) < large
    largest_alone = converted_run("unet", layers=[name for name, count in counts.items() if count == large])
    report = linearize_(model, SMALL, dense_below=large)
    assert len(report.swapped) == len(counts)
    with count_implementations(model) as seen:
        assert torch.equal(run(model, arguments), largest_alone)
    dense_modules = sum(count < large for count in counts.values())
    description = describe_implementations(seen, model)
    assert f"{dense_modules} x original (fewer than {large} image tokens)" in description
    assert f"{len(counts) - dense_modules} x " in description and "covers" not in description


@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_forced_implementation_ignores_dense_below(impl: str) -> None:
    expected = converted_run("flux", impl=impl)
    assert torch.equal(converted_run("flux", impl=impl, dense_below=1000), expected)
    model = base()
    linearize_(model, SMALL, dense_below=1000)
    set_impl_(model, impl)
    with count_implementations(model) as seen:
        assert torch.equal(run(model, inputs_of("flux")), expected)
    assert describe_implementations(seen, model) == impl
    assert swap_report(model).dense_below == 0


def test_reports_name_the_dense_below_limit() -> None:
    model = base()
    report = linearize_(model, SMALL, dense_below=4096)
    assert str(report).endswith("(family flux, impl auto, original below 4,096 image tokens)")
    assert describe_attention(model) == str(report)
    with count_implementations(model) as seen:
        run(model, inputs_of("flux"))
    assert describe_implementations(seen, model) == "original (fewer than 4,096 image tokens)"


@pytest.mark.parametrize("value", [-1, 1.5, True, "4096", None])
def test_dense_below_refuses_values_that_are_not_counts(value: Any) -> None:
    model = base()
    with pytest.raises(ValueError, match="dense_below must be an integer >= 0, got "):
        linearize_(model, SMALL, dense_below=value)
    assert not swapped(model)


@pytest.mark.parametrize("train", [lambda model: add_lora_(model, rank=2), lambda model: train_full_(model)])
def test_trained_student_ignores_dense_below_with_a_warning(train: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, arguments = base(), inputs_of("flux")
    original = run(model, arguments)
    linearize_(model, SMALL, dense_below=1000)
    assert not caplog.records
    train(model)
    assert caplog.text.count(UNUSED) == 1
    student = run(model, arguments)
    assert torch.equal(student, converted_run("flux"))  # the trainable weights are still at their initial values
    assert swap_report(model).dense_below == 0
    with dense(model):
        assert torch.equal(run(model, arguments), original)
    caplog.clear()
    assert linearize_(model, SMALL, dense_below=1000).dense_below == 0
    assert caplog.text.count(UNUSED) == 1
    assert torch.equal(run(model, arguments), student)


def test_load_adapter_with_trained_weights_warns_once_about_dense_below(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student, arguments = base(), inputs_of("flux")
    linearize_(student, SMALL, dense_below=1000)
    for parameter in (add_lora_(student, rank=2) | train_full_(student)).values():
        parameter.data.add_(torch.randn_like(parameter))
    save_adapter(student, tmp_path / "adapter")
    assert read_manifest(tmp_path / "adapter" / MANIFEST).dense_below == 1000
    caplog.clear()
    model = base()
    assert load_adapter_(model, tmp_path / "adapter").dense_below == 0
    assert caplog.text.count(UNUSED) == 1
    assert torch.equal(run(model, arguments), run(student, arguments))


def test_linfusion_input_terms_are_off_where_dense_below_applies() -> None:
    model, arguments = base("unet"), inputs_of("unet")
    original = run(model, arguments)
    linearize_(model, LinFusion(), dense_below=1000)
    for name, parameter in model.named_parameters():
        if ".linear_kernel." in name:
            parameter.data.normal_()
    assert torch.equal(run(model, arguments), original)
    set_impl_(model, "torch")
    assert not torch.allclose(run(model, arguments), original)


def test_upstream_mask_is_kept_where_dense_below_applies() -> None:
    model, arguments = base("chroma"), inputs_of("chroma")
    arguments["attention_mask"] = torch.ones(2, arguments["encoder_hidden_states"].shape[1] + 35)
    arguments["attention_mask"][0, 0] = 0.0
    original = run(model, arguments)
    linearize_(model, Neighborhood(window=3), dense_below=36)
    assert torch.equal(run(model, arguments), original)


def _saved(pipe: Any, folder: Path, form: str) -> Path:
    if form == "adapter":
        return save_adapter(pipe, folder)
    if form == "one file":
        return save_adapter(pipe, folder.with_suffix(".safetensors"))
    if form == "merged":
        return save_merged(pipe, folder)
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", ["adapter", "one file", "merged", "save_pretrained"])
def test_dense_below_survives_saving_and_loading(form: str, tmp_path: Path) -> None:
    plain = from_pretrained(_plain_adapter(tmp_path))
    arguments = inputs_of("flux")
    with dense(plain):
        original = run(plain.transformer, arguments)
    linearize_(plain, SMALL, dense_below=1000)
    again = from_pretrained(_saved(plain, tmp_path / "student", form))
    assert swap_report(again).dense_below == 1000
    assert torch.equal(run(again.transformer, arguments), original)
    assert inspect_base(_saved(plain, tmp_path / "other", form)).dense_below == 1000


def _plain_adapter(folder: Path) -> Path:
    saved_flux_pipeline(folder / "base")
    convert_base(folder / "base", SMALL, output=folder / "plain")
    return folder / "plain"


def test_files_omit_dense_below_when_it_is_zero(tmp_path: Path) -> None:
    pipe = flux_pipeline()
    linearize_(pipe, SMALL)
    save_adapter(pipe, tmp_path / "adapter")
    pipe.save_pretrained(tmp_path / "saved")
    entries = json.loads((tmp_path / "adapter" / MANIFEST).read_text())
    entry = json.loads((tmp_path / "saved" / "transformer" / "config.json").read_text())["lineardit"]
    assert "dense_below" not in entries and "dense_below" not in entry
    assert read_manifest(tmp_path / "adapter" / MANIFEST).dense_below == read_entry(entry).dense_below == 0


def test_merged_trained_student_warns_that_dense_below_is_unused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = from_pretrained(_plain_adapter(tmp_path))
    linearize_(pipe, SMALL, dense_below=1000)
    add_lora_(pipe, rank=2)
    save_merged(pipe, tmp_path / "merged")
    caplog.clear()
    again = from_pretrained(tmp_path / "merged")
    assert caplog.text.count(UNUSED) == 1 and swap_report(again).dense_below == 0
    assert inspect_base(tmp_path / "merged").dense_below == 0


def test_inspect_and_model_card_report_dense_below(tmp_path: Path) -> None:
    saved_flux_pipeline(tmp_path / "base")
    for name, limit in (("with", 10**6), ("without", 0)):
        convert_base(tmp_path / "base", SMALL, output=tmp_path / name, dense_below=limit)
    inspection, plain = inspect_base(tmp_path / "with"), inspect_base(tmp_path / "without")
    assert {row.impl for row in inspection.rows} == {
        "original (fewer than 1,000,000 image tokens) at 1K 2K, tiled at 4K 8K"
    }
    assert [step.after == step.before for step in inspection.flops] == [True, True, False, False]
    assert inspection.flops[2:] == plain.flops[2:]
    assert inspect_base(tmp_path / "with", impl="tiled").flops == plain.flops
    expected = "clear (radius 1.5); original attention below 1,000,000 image tokens |"
    assert expected in adapter_card(read_manifest(tmp_path / "with" / MANIFEST), "me/it")
    assert "original attention" not in adapter_card(read_manifest(tmp_path / "without" / MANIFEST), "me/it")


def test_inspect_reports_where_the_window_covers_the_image(tmp_path: Path) -> None:
    saved_flux_pipeline(tmp_path / "base")
    convert_base(tmp_path / "base", Clear(radius=400), output=tmp_path / "wide")
    assert inspect_base(tmp_path / "wide").rows[0].impl.startswith("original (the window covers the picture) at 1K, ")


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"config": None, "dense_below": 9, "importer": "linfusion:x"},
            "at every size: omit dense_below, got dense_below=9",
        ),
        ({"config": SMALL, "dense_below": -9}, "dense_below must be an integer >= 0, got -9"),
    ],
)
def test_convert_refuses_an_invalid_dense_below(options: dict, message: str, merge: bool, tmp_path: Path) -> None:
    saved_flux_pipeline(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        (convert_and_merge if merge else convert_base)(tmp_path / "base", output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_merging_an_adapter_refuses_a_new_dense_below(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dense_below of an adapter cannot be changed, got dense_below=9"):
        convert_and_merge(_plain_adapter(tmp_path), output=tmp_path / "merged", dense_below=9)


def test_linearize_with_dense_below_does_not_warn_without_trained_weights(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        linearize_(base(), SMALL, dense_below=1000)
    assert not caplog.records
